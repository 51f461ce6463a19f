"""Weights that are larger than memory: read when an operator needs them, and kept in files."""
