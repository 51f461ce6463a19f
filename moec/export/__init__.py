"""Exports compiled models as ONNX files, which are run and compared before they are published."""
