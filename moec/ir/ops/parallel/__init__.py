"""Ops of several ranks."""
