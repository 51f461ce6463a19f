"""The operators of moec: signature, type rule, and meaning in eager PyTorch.

T tokens, E experts, k choices a token, D model width, H hidden width, R = k*T routed rows.
Rows are the T*k choices sorted by expert (stable): row r is choice order[r] = t*k + s of
token t, and expert e owns rows ends[e-1]..ends[e]. Ids of E and more mean "no expert": their
rows come after ends[E-1], hold zeros, and add nothing.
"""

from __future__ import annotations

from moec.ir.opdef import OPS, OpDef
from moec.ir.ops import sizes
from moec.ir.ops.dense import attention, linear_attention, norm, rotary
from moec.ir.ops.experts import (
    compressed,
    dispatch,
    grouped,
    mixed,
    quantised,
    quantised_linear,
    soft_mixture,
    zero_experts,
)
from moec.ir.ops.parallel import dist
from moec.ir.ops.routing import gate

__all__ = [
    "OPS",
    "OpDef",
    "attention",
    "compressed",
    "dispatch",
    "dist",
    "gate",
    "grouped",
    "linear_attention",
    "mixed",
    "norm",
    "quantised",
    "quantised_linear",
    "rotary",
    "sizes",
    "soft_mixture",
    "zero_experts",
]
