"""Formats of quantised and compressed weights: how they are stored, and their values."""
