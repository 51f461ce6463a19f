"""Finds modules whose result depends on how often, or with what, they were called before."""
