"""Reads, checks and runs artifacts, without PyTorch and without a compiler."""
