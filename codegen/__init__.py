"""Graph -> code: lowering to TVM Relax, and the kernels of each kind of target."""
