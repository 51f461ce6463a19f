"""The least cost of a call of a graph: arithmetic of its products, and bytes that it reads.

Linear layers, experts and attention are counted. An expert is read if a token chose it. If each of
the T*k choices is equally likely to be any expert, E * (1 - (1 - k/E)^T) of E experts are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.ops.experts.compressed import GroupedCompressed
from moec.ir.ops.experts.quantised import Matrix
from moec.ir.ops.experts.quantised_linear import QuantisedLinear, matrices_of
from moec.ir.sizes.dims import evaluate_dim
from moec.runtime.call.profile import SortedRows
from moec.runtime.dtypes import NUMPY

Env = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(graph: Graph, env: Env, context: int) -> Cost:
    """The cost of one call with sizes `env`, when `context` keys of each cache are read."""
    params = set(graph.params)
    costs = (op_cost(op, env, context, params) for op in graph.ops)
    return sum((each for each in costs if each is not None), Cost())


def op_cost(
    op: Op, env: Env, context: int, params: Set[Value], rows: SortedRows | None = None
) -> Cost | None:
    """The arithmetic of a product, and the bytes of its weights and of the keys and values that it
    reads; None for any other op. Without `rows`, each expert is equally likely."""
    match op.name:
        case "grouped.linear":
            return _experts(op, env, params, rows)
        case "grouped.quantised" | "grouped.mixed":
            return _quantised(op, env, rows)
        case "nn.quantised_linear":
            return _quantised_linear(op, env)
        case "grouped.compressed":
            return _compressed(op, env, rows)
        case "nn.attention":
            return _attention(op, env, context)
        case "aten.linear.default" | "aten.mm.default" | "aten.addmm.default":
            return _product(op, env, params)
        case "moe.gate":
            x, weight = op.inputs[:2]
            flops = 2.0 * _count(x, env) * evaluate_dim(weight.shape[0], env)
            return Cost(flops, size_of(weight, env))
    return None


def _chosen(op: Op, env: Env, experts: int, sorted_rows: SortedRows | None) -> tuple[int, float]:
    """The rows of a grouped product, and the share of its experts that have some."""
    if sorted_rows is not None:
        return sorted_rows.rows, sorted_rows.used / experts
    rows = evaluate_dim(op.outputs[0].shape[0], env)
    return rows, 1 - (1 - 1 / experts) ** rows


def _count(value: Value, env: Env) -> int:
    return math.prod(evaluate_dim(dim, env) for dim in value.shape)


def size_of(value: Value, env: Env) -> float:
    """Bytes."""
    return float(_count(value, env) * NUMPY[value.dtype].itemsize)


def _product(op: Op, env: Env, params: Set[Value]) -> Cost:
    weights = [value for value in op.inputs if value in params]
    out = op.outputs[0]
    width = max((evaluate_dim(v.shape[-1], env) for v in op.inputs if v not in params), default=0)
    return Cost(2.0 * _count(out, env) * width, sum(size_of(value, env) for value in weights))


def _experts(op: Op, env: Env, params: Set[Value], sorted_rows: SortedRows | None) -> Cost:
    """Rows R = k*T times the matrices of their experts; params are stacked over E."""
    stacked = [value for value in op.inputs if value in params and len(value.shape) == 3]
    if not stacked:
        return Cost()
    experts = evaluate_dim(stacked[0].shape[0], env)
    rows, share = _chosen(op, env, experts, sorted_rows)
    flops = sum(2.0 * rows * _count(v, env) / experts for v in stacked)
    held = sum(size_of(v, env) for v in op.inputs if v in params)
    return Cost(flops, held * share)


def _quantised(op: Op, env: Env, sorted_rows: SortedRows | None) -> Cost:
    matrices = matrices_of(op)
    experts = evaluate_dim(op.inputs[1].shape[0], env)
    rows, share = _chosen(op, env, experts, sorted_rows)
    held = sum(_stored(matrix, format, env) for matrix, format, _ in matrices)
    flops = sum(2.0 * rows * _count(m.codes, env) / experts for m, _, _ in matrices)
    return Cost(flops, held * share)


def _quantised_linear(op: Op, env: Env) -> Cost:
    parts = QuantisedLinear.of(op)
    rows = _count(parts.x, env) / evaluate_dim(parts.x.shape[-1], env)
    flops = 2.0 * rows * _count(parts.matrix.codes, env)
    return Cost(flops, _stored(parts.matrix, parts.format, env))


def _stored(matrix: Matrix, format: Format, env: Env) -> float:
    """The bytes of a matrix as kernels store it; in the graph each code takes one byte."""
    rest = sum(size_of(value, env) for value in matrix.values if value is not matrix.codes)
    return _count(matrix.codes, env) * format.bits / 8 + rest


def _compressed(op: Op, env: Env, sorted_rows: SortedRows | None) -> Cost:
    """Compressed stacks, of which only experts with rows are read. The dictionary is cached."""
    parts = GroupedCompressed.of(op)
    experts = evaluate_dim(parts.ends.shape[0], env)
    rows, share = _chosen(op, env, experts, sorted_rows)
    width = evaluate_dim(parts.x.shape[1], env) * evaluate_dim(op.outputs[0].shape[1], env)
    held = sum(size_of(value, env) for matrix in parts.matrices for value in matrix)
    return Cost(2.0 * rows * width * len(parts.matrices), held * share)


def _attention(op: Op, env: Env, context: int) -> Cost:
    """Query s of S attends to the keys up to itself: on average context - (S - 1)/2 keys."""
    a = Attention.of(op)
    queries = evaluate_dim(a.shape("q")[2], env)
    keys = context if a.first is not None else queries
    per_row = keys - (queries - 1) / 2
    widths = evaluate_dim(a.q.shape[3], env) + evaluate_dim(a.v.shape[3], env)
    rows = _count(a.q, env) / evaluate_dim(a.q.shape[3], env)
    batch, shared, *_ = a.shape("k")
    heads = evaluate_dim(batch, env) * evaluate_dim(shared, env)
    size = NUMPY[a.k.dtype].itemsize
    return Cost(2.0 * rows * per_row * widths, float(heads * keys * widths * size))
