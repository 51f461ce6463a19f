"""Calls of a compiled model: arguments, caches, recorded routing."""
