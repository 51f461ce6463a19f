"""Capture: a module, Hugging Face folder, .pt2 file or factory becomes a captured program."""

from moec.capture.capture import capture
from moec.capture.captured import Captured

__all__ = ["Captured", "capture"]
