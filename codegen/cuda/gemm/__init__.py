"""Products of rows with weights of floats."""
