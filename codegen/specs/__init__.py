"""Specs: what kernels compute, for all targets. Sizes and dtypes, no layouts and no lanes."""
