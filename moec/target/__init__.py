"""Descriptions of machines, for the generation of kernels and the check of artifacts."""
