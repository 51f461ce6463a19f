"""Where models come from: checkpoints, ONNX files, and the memory of their weights."""
