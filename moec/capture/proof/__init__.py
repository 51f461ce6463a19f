"""Compares a captured graph with its module, and settles its guards."""
