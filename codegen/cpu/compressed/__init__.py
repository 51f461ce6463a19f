"""Products with compressed weights, which are decoded inside the kernel."""
