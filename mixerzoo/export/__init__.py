"""`mixerzoo export`: a student as ONNX, as a torch.export program, as one safetensors file, as a folder for a hub."""
