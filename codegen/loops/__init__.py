"""ATen ops that need no kernel of their own: scalar expressions, fused into loops."""
