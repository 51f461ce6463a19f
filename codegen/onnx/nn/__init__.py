"""Attention, norms and rotary embeddings as nodes of ONNX."""
