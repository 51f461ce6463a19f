"""Interpreters of graphs: by the meaning of ops in PyTorch, and by their type rules (verifier)."""
