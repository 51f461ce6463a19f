"""Finds out what a module computes as a mixture of experts by running it, and proves it."""
