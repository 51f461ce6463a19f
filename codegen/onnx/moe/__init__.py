"""Routers and experts as nodes of ONNX, or whole blocks as one of ONNX Runtime's."""
