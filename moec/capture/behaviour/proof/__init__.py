"""Proves that a replacement computes what the layer computes."""
