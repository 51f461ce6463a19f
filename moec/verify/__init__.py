"""Compiled models against eager PyTorch: tolerances, blame, bisection."""
