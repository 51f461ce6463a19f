"""Passes that change the model: opt-in, measured, kept within a budget."""
