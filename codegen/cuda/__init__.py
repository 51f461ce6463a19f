"""Kernels for NVIDIA GPUs, and their compilation to CUDA C and cubins."""
