"""Graph -> code: lowering to TVM Relax, and the CPU kernels."""
