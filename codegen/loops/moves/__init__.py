"""Ops that move elements: other positions, shapes, indices."""
