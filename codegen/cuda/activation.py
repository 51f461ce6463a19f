"""Activations of gated and plain experts, as expressions of float32 scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cuda.instructions import exp

Epilogue: TypeAlias = Callable[..., Expr]
"""(sum) or (gate, up) -> result."""


def sigmoid(x: Expr) -> Expr:
    return T.float32(1) / (T.float32(1) + exp(-x))


def silu(x: Expr) -> Expr:
    return x / (T.float32(1) + exp(-x))


def gated(activation: Epilogue) -> Epilogue:
    """activation(gate) * up: SwiGLU, GeGLU and similar (arXiv 2002.05202)."""
    return lambda gate, up: activation(gate) * up
