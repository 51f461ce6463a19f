"""Runs the ranks of a plan as processes, with torch.distributed."""
