"""Quantisation of weights to few bits: opt-in and approximate."""
