"""Kernels that choose experts, sort the choices by expert, and combine the results per token."""
