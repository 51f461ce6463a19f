"""Predicts seconds and bytes, from a model of the cluster or by replaying routed tokens."""
