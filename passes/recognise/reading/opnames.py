"""Names of ATen ops, grouped by their meaning for `Reader`."""

from __future__ import annotations

from moec.ir import traits
from moec.ir.traits import VIEWS

ADDS = {"aten.index_put.default", "aten.index_add.default", "aten.scatter_add.default"}
SCATTERS = {"aten.scatter_add.default"}
CHOOSES = "aten.where.self"
GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}
PRODUCTS = {*traits.PRODUCTS, *GROUPED}
MULTIPLY = {"aten.mul.Tensor", "aten.div.Tensor"}
SPREAD = {
    "aten.expand.default",
    "aten.repeat.default",
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.index_put.default",
    "aten.gather.default",
    "aten.bmm.default",
    "aten.mm.default",
    "aten.matmul.default",
}
"""Ops that may copy tokens before they are routed; they are then part of the block."""
REARRANGE = VIEWS | {"aten.permute.default", "aten.expand.default"}
PICKS = {"aten.index.Tensor", "aten.index_select.default", "aten.embedding.default"}
ZEROS = {
    "aten.empty_like.default",
    "aten.full.default",
    "aten.full_like.default",
    "aten.scalar_tensor.default",
    "aten.zeros_like.default",
    "aten.zeros.default",
    "aten.empty.memory_format",
    "aten.empty_permuted.default",
}
"""Ops that give zeros, or uninitialised memory that may be read as zeros."""
ACROSS = {
    "aten.mean.dim",
    "aten.sum.dim_IntList",
    "aten.amax.default",
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.var.correction",
    "aten.linalg_vector_norm.default",
}
