"""ONNX files as torch modules: what moec captures, recognises and compiles as it does others."""

from __future__ import annotations

from moec.sources.onnx.module import OnnxModule
from moec.sources.onnx.read import open_onnx

__all__ = ["OnnxModule", "open_onnx"]
