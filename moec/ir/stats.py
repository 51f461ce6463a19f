"""Counts of a program: stored bytes, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from moec.ir.graph import Graph, Op, Program
from moec.ir.sizes.dims import Dim, evaluate_dim, product, symbols

if TYPE_CHECKING:
    import torch


def stored_bytes(program: Program) -> int:
    """Bytes of the weights that the graph reads; tensors that share memory count once."""
    return sum(count_weights(program.graph, program.weights)[1].values())


def count_weights(graph: Graph, weights: Mapping[str, torch.Tensor]) -> tuple[int, dict[str, int]]:
    """The number of parameters, and the bytes stored for each dtype of the IR.

    Parameters that share storage (tied embeddings) count once.
    """
    bytes_by_dtype: dict[str, int] = {}
    parameters = 0
    counted: set[tuple[int, int]] = set()
    # Of compressed weights, the decoded elements count as parameters, not the stored ones.
    stacks = [op for op in graph.ops if op.name == "moe.decompress"]
    compressed = {value.name for op in stacks for value in op.inputs}
    parameters += sum(cast(int, product(op.outputs[0].shape)) for op in stacks)
    for param in graph.params:
        tensor = weights.get(param.name)
        if tensor is None:
            continue
        storage = (tensor.data_ptr(), tensor.numel())
        if storage[0] and storage in counted:
            continue
        counted.add(storage)
        parameters += tensor.numel() if param.name not in compressed else 0
        size = tensor.numel() * tensor.element_size()
        bytes_by_dtype[param.dtype] = bytes_by_dtype.get(param.dtype, 0) + size
    return parameters, bytes_by_dtype


def product_flops(graph: Graph, sizes: Mapping[str, int]) -> int:
    """FLOPs of all matrix products, two per multiply-add, without those of attention's scores.

    `sizes` binds the named sizes. Experts count the rows that are routed to them; where choices
    may take no row (zero experts), the attribute `share` is the measured share that does.
    """
    total = 0
    for op in graph.ops:
        if op.name == "moe.experts" and op.body is not None:
            rows = evaluate_dim(op.inputs[0].shape[0], sizes)
            body_sizes = dict.fromkeys(symbols(op.body.inputs[0].shape[0]), rows)
            share = op.attrs.get("share", 1.0)
            assert isinstance(share, float)
            total += round(share * product_flops(op.body, {**sizes, **body_sizes}))
        elif op.name == "moe.soft_mixture" and op.body is not None:
            batch, tokens, slots = op.inputs[1].shape
            rows = evaluate_dim(product((batch, slots)), sizes)
            body_sizes = dict.fromkeys(symbols(op.body.inputs[0].shape[0]), rows)
            total += product_flops(op.body, {**sizes, **body_sizes})
            widths = op.inputs[0].shape[2] + op.outputs[0].shape[2]
            total += 2 * rows * evaluate_dim(product((tokens, widths)), sizes)
        elif (inner := _inner(op)) is not None:
            total += 2 * evaluate_dim(product((*op.outputs[0].shape, inner)), sizes)
    return total


def _inner(op: Op) -> Dim | None:
    """The axis over which a product of matrices sums."""
    match op.name:
        case "aten.linear.default" | "aten.mm.default" | "aten.bmm.default" | "aten.matmul.default":
            return op.inputs[0].shape[-1]
        case "aten.addmm.default" | "aten.baddbmm.default":
            return op.inputs[1].shape[-1]
    return None
