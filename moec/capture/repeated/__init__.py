"""Layers that are alike are captured once: the first of each kind are traced, and the graph is
repeated for the others."""

from __future__ import annotations

from moec.capture.repeated.capture import capture_repeated

__all__ = ["capture_repeated"]
