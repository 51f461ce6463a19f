"""Where the time of a compiled model goes: its kernels, their least costs, the machine's limits."""
