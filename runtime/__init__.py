"""Artifact -> numbers: reading, checking and running; needs no PyTorch."""
