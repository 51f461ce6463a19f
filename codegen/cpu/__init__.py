"""CPU kernels: TVM TIR generated from a description of the target."""
