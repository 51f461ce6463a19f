"""D model width, H hidden width, E experts, K choices a token."""

D, H, E, K = 8, 16, 4, 2
