"""Fewer ops that compute the same, in any graph."""
