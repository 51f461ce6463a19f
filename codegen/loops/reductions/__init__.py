"""Ops that compute an element from many: sums, norms, orders, products."""
