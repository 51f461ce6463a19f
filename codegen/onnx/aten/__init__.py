"""ATen's ops as nodes of ONNX."""
