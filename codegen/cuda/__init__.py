"""Kernels for NVIDIA GPUs, and what makes CUDA C and cubins of them."""
