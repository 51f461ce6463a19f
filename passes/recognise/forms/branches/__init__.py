"""Experts written out one by one: branches that differ only in their weights."""
