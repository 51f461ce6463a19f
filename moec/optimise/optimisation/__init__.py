"""Chooses the formats of weights for a limit of memory or of quality."""
