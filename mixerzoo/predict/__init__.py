"""`mixerzoo predict`: what a student, or an exported ONNX file, sees in images."""
