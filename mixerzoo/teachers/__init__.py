"""The embedded teacher: weights, model card and the script that trained it."""
