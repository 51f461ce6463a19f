"""Decomposes an export to core ATen, operator by operator."""

from moec.capture.decomposition.composite import decompositions
from moec.capture.decomposition.expand import decompose

__all__ = ["decompose", "decompositions"]
