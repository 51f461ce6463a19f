"""Guesses of the next tokens of a text, which a call of the model verifies."""
