"""Doors in: a module, a Hugging Face folder, a .pt2, a factory -> a captured program."""

from moec.capture.capture import Captured, capture

__all__ = ["Captured", "capture"]
