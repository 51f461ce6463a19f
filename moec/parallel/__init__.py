"""Running the ranks of a plan as processes, on torch.distributed."""
