"""The operators of moec: signature, type rule, and meaning in eager PyTorch.

T tokens, E experts, k choices a token, D model width, H hidden width, R = k*T routed rows.
Rows are the T*k choices sorted by expert (stable): row r is choice order[r] = t*k + s of
token t, and expert e owns rows ends[e-1]..ends[e]. Ids of E and more mean "no expert": their
rows come after ends[E-1], hold zeros, and add nothing.
"""

from __future__ import annotations

from moec.ir.opdef import OPS, OpDef
from moec.ir.ops.dense import add_norm, attention, cache, linear_attention, norm, rotary
from moec.ir.ops.experts import (
    compressed,
    dispatch,
    grouped,
    grouped_combine,
    mixed,
    mixture,
    neurons,
    quantised,
    quantised_linear,
    soft_mixture,
    zero_experts,
)
from moec.ir.ops.parallel import dist
from moec.ir.ops.routing import force, gate, hierarchy
from moec.ir.ops.sizes import bound, require_count, require_index, size

__all__ = [
    "OPS",
    "OpDef",
    "add_norm",
    "attention",
    "bound",
    "cache",
    "compressed",
    "dispatch",
    "dist",
    "force",
    "gate",
    "grouped",
    "grouped_combine",
    "hierarchy",
    "linear_attention",
    "mixed",
    "mixture",
    "neurons",
    "norm",
    "quantised",
    "quantised_linear",
    "require_count",
    "require_index",
    "rotary",
    "size",
    "soft_mixture",
    "zero_experts",
]
