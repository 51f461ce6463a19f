"""Products of rows with weights of few bits."""
