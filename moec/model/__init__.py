"""Compiled models: to call, to generate text with, to save, load and rebuild."""
