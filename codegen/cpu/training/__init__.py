"""Products and gradients with unpacked matrices, in PyTorch's layout."""
