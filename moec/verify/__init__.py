"""Compares compiled models with eager PyTorch, and finds the pass that changed the numbers."""
