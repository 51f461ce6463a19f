"""A cluster's devices and links, and the cost of sending rows over them."""
