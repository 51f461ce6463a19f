"""Experts as stacks of weights: products of rows with each, or one opaque op."""
