"""Formats of quantised folders, each by its published layout."""
