"""D model width, H hidden width, E experts, K choices per token."""

D, H, E, K = 8, 16, 4, 2
