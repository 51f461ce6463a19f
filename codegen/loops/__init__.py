"""ATen ops without a kernel: scalar expressions, fused into loops."""
