"""Gradients of blocks, and the kernels that compute them."""
