"""Passes that leave fewer ops with the same results, in any graph."""
