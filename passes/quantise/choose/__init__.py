"""Chooses the format of each product's weights for a limit of memory or of quality."""
