"""Plans for many devices: which rank holds what, which rows travel how, and what that costs."""
