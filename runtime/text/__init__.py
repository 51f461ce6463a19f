"""Texts: prompts to tokens, tokens to continuations, continuations to text."""
