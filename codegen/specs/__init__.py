"""Specs: what kernels compute, for all targets. Sizes and dtypes, but no layouts and no lanes."""
