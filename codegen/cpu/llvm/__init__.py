"""LLVM functions, as text, that kernels call by name."""
