"""Kernels become CUDA C, and CUDA C cubins."""
