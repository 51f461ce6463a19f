"""Capture: a module, Hugging Face folder, .pt2 file or factory becomes a captured program."""

from moec.capture.capture import Captured, capture

__all__ = ["Captured", "capture"]
