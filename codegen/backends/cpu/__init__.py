"""CPUs: products with weights packed in the layouts that the kernels of codegen/cpu read."""
