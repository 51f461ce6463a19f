"""CPUs: products with weights that are packed as the kernels of codegen/cpu stream them."""
