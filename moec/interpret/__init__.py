"""Graphs run op by op: by their meaning in PyTorch, and by their type rules."""
