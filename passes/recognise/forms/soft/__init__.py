"""Soft mixtures: all experts are used, weighted by a softmax."""
