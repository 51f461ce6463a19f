"""Descriptions of machines, for the generation of kernels and for the check of artifacts."""
