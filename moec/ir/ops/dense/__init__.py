"""Ops of the dense part of a transformer: norms, attention, its cache."""
