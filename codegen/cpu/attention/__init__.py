"""Kernels of attention and of the caches of keys and values."""
