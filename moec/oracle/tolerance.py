"""The distance of two results, and the tolerances for it."""

from __future__ import annotations

import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Graph
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS, matrices_of
from moec.oracle.rounding import FLOAT32_UNIT, distances, real_parts

TOLERANCES = {"f64": 1e-4, "f32": 1e-4, "f16": 1e-2, "bf16": 2e-2}
"""The greatest error allowed, relative to the greatest value of the output.

Sums are reordered, so f32 may lose a few of its 24 bits; bf16 has 8 and f16 has 11, and eager
rounds to them after every op, where a fused kernel does not.
"""


QUANTISED = 4e-3
"""The error that a row may always have where rows are rounded to 8 bits: half of 1/127. A row that
differs in its last bit may round to another code, which changes a result by 1/127 of one of its
dozens to thousands of terms; and this may happen in every layer."""


EXACT_ROWS = 3e-2
"""The tolerance of rows that are rounded to 8 bits against rows that are not. Here every term of a
sum changes, by up to half of 1/127 of its block's greatest. Experts without residuals round twice
and multiply two of the results, and their outputs change by 1e-2 to 2.3e-2 of the greatest of a
token. With residuals it is less: below 7e-3 for 90 % of the tokens of a trained model of four
layers."""


def default_tolerance(graph: Graph) -> float:
    """The loosest tolerance among the dtypes in which the model computes."""
    used = computed_dtypes(graph)
    limit = max((TOLERANCES[dtype] for dtype in used), default=TOLERANCES["f32"])
    return max(limit, rounded_rows(graph))


def rounded_rows(graph: Graph) -> float:
    """The tolerance of a graph that rounds rows to 8 bits; 0 for others. With 16 bits, a row that
    rounds to another code changes a result by 1/32639 of one of its terms, which is within the
    tolerance of f32."""
    ops = (op for op in graph.ops if op.name in QUANTISED_OPS)
    rounding = [op for op in ops if op.attrs.get("row_bits", 8) == 8]
    exact = any(op.attrs.get("exact_rows") for op in rounding)
    return (EXACT_ROWS if exact else QUANTISED) if rounding else 0.0


def computed_dtypes(graph: Graph) -> set[str]:
    """The dtypes of floats that hold more than the scales of quantised weights."""
    quantised = [op for op in graph.ops if op.name in QUANTISED_OPS]
    scales = {stored.matrix.scales for op in quantised for stored in matrices_of(op)}
    return {v.dtype for v in graph.values() if v.dtype in FLOATS and v not in scales}


def rounds_to_16_bits(graph: Graph) -> bool:
    """Whether a graph computes in 16-bit floats."""
    return not computed_dtypes(graph).isdisjoint(("f16", "bf16"))


def are_close(actual: torch.Tensor, expected: torch.Tensor, limit: float = FLOAT32_UNIT) -> bool:
    """Whether their distance is at most a limit, by default that of float32 for reordered sums."""
    return distance(actual, expected) <= limit


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference, relative to the greatest finite expected value; inf where shapes or
    dtypes differ, or where integers, NaNs or infinities differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    actual, expected = real_parts(actual), real_parts(expected)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    errors, norms = distances(actual, expected)
    return float(errors.max()) / (float(norms.max()) or 1.0)
