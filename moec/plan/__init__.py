"""Plans for many devices: placement of experts, exchange of rows, and predicted cost."""
