"""The Python values that a module keeps between calls: where they live, and how they go back."""
