"""How each kind of target makes code: the rules of its products, its kernels, its compiler."""

from moec.codegen.backends.registry import BACKENDS, backend_for

__all__ = ["BACKENDS", "backend_for"]
