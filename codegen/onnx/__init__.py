"""Graph -> ONNX: the whole model as one file for ONNX Runtime, checked against eager."""
