"""The user's lines of code, and replacements of functions that they call."""
