"""Activations of gated and plain experts, as expressions of float32 scalars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cuda.instructions import erf, exp, tanh

Epilogue: TypeAlias = Callable[..., Expr]
"""(sum) or (gate, up) -> result."""


def sigmoid(x: Expr) -> Expr:
    return T.float32(1) / (T.float32(1) + exp(-x))


def silu(x: Expr) -> Expr:
    return x / (T.float32(1) + exp(-x))


def gelu(x: Expr) -> Expr:
    return x * T.float32(0.5) * (T.float32(1) + erf(x * T.float32(math.sqrt(0.5))))


def gelu_tanh(x: Expr) -> Expr:
    cubic = x + T.float32(0.044715) * x * x * x
    return x * T.float32(0.5) * (T.float32(1) + tanh(cubic * T.float32(math.sqrt(2 / math.pi))))


def relu_squared(x: Expr) -> Expr:
    positive = T.max(x, T.float32(0))
    return positive * positive


def gated(activation: Epilogue) -> Epilogue:
    """activation(gate) * up: SwiGLU, GeGLU and similar (arXiv 2002.05202)."""
    return lambda gate, up: activation(gate) * up


def clamped_swiglu(alpha: float, limit: float) -> Epilogue:
    """The activation of GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit`
    and up clamped to ±`limit`."""

    def join(gate: Expr, up: Expr) -> Expr:
        bound = T.float32(limit)
        gate = T.bind(T.min(gate, bound))
        up = T.max(T.min(up, bound), -bound)
        return (up + T.float32(1)) * gate * sigmoid(gate * T.float32(alpha))

    return join
