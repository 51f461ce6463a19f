"""Kernels that choose experts, sort the choices and bring rows back."""
