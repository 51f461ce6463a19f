"""Products of codes of few bits."""
