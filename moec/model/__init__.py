"""Models that are compiled: to call, to generate text, to save, load and rebuild."""
