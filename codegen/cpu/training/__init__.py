"""Products, and their gradients, of matrices as PyTorch keeps them."""
