"""The Python values that a module keeps between calls, and how they go back."""
