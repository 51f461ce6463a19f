"""Capture: a module, Hugging Face folder, .pt2 file or factory becomes a captured program."""

from moec.cache import set_inductor_folder
from moec.capture.capture import capture
from moec.capture.captured import Captured

__all__ = ["Captured", "capture"]

set_inductor_folder()  # torch.export reads files of it, too
