"""Compiled models as ONNX files, run and compared before they have their name."""
