"""Code generation for each kind of target: the rules of its products, its kernels, its compiler."""

from moec.codegen.backends.registry import BACKENDS, backend_for

__all__ = ["BACKENDS", "backend_for"]
