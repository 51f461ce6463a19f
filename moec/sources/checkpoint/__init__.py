"""Checkpoints as people have them: recognised by their contents, read weight by weight."""
