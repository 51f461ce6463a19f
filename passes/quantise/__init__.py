"""Weights as numbers of few bits: opt-in, and approximate."""
