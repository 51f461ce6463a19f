"""Models that passes changed, as PyTorch modules."""
