"""Finds everything that cannot be compiled, before compilation, and reports it in one error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType

import sympy

from moec.codegen.loops.emit import EMIT
from moec.codegen.loops.index import names
from moec.codegen.loops.rules import takes_complex
from moec.errors import IRError, UnsupportedError
from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import Bounds, Dim, evaluate_dim, product
from moec.ir.sizes.thresholds import nearest_allowed


def check(
    graph: Graph,
    own_kernel: Callable[[Op], bool],
    reasons: Mapping[Op, str] = MappingProxyType({}),
    host_sizes: Mapping[str, Dim] = MappingProxyType({}),
) -> None:
    """Raise UnsupportedError unless every op and every size of the graph can be compiled.

    `reasons` say why kernels refused an op; `host_sizes` are sizes that the runtime computes.
    """
    problems: dict[str, list[Op]] = {}
    for op in graph.ops:
        reason = _refusal(op, own_kernel, reasons)
        if reason:
            problems.setdefault(reason, []).append(op)
    lines = [line(reason, ops) for reason, ops in problems.items()]
    refused = {op for ops in problems.values() for op in ops}
    lines += _sizes(graph, refused, host_sizes)
    lines += fixed(graph, host_sizes)
    if lines:
        raise UnsupportedError(
            "the model cannot be compiled:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nreplace these operations in the model, or run the part that contains them "
            "outside of the compiled module"
        )


def _refusal(op: Op, own_kernel: Callable[[Op], bool], reasons: Mapping[Op, str]) -> str:
    if own_kernel(op):
        return ""
    if op.name == "aten.nonzero.default":
        return "operator aten.nonzero.default has a result whose size depends on the data"
    if op.name not in EMIT:
        why = reasons.get(op) or _body_refusal(op)
        return f"operator {op.name} has no kernel" + (f": {why}" if why else "")
    tensors = (*op.inputs, *op.outputs)
    if any(v.dtype == "c64" for v in tensors) and not takes_complex(op.name):
        return f"operator {op.name} has no kernel for complex numbers"
    if op.name in ("aten.index.Tensor", "aten.index_put.default"):
        indices = op.inputs[1:] if op.name == "aten.index.Tensor" else op.inputs[1:-1]
        if any(v.dtype in ("bool", "u8") for v in indices):
            return f"operator {op.name} with a mask has a result whose size depends on the data"
    if op.name == "aten.histc.default" and op.attrs.get("min", 0) == op.attrs.get("max", 0):
        return "operator aten.histc.default has no kernel for limits that are those of the data"
    if op.name == "aten.convolution.default" and op.attrs.get("transposed"):
        return "operator aten.convolution.default has no kernel for a transposed convolution"
    return ""


def _body_refusal(op: Op) -> str:
    """The operators in an expert's body without loops; experts with them are not lowered."""
    body = () if op.body is None else op.body.ops
    missing = dict.fromkeys(inner.name for inner in body if inner.name not in EMIT)
    return f"its body holds {', '.join(missing)}, which has none" if missing else ""


def line(reason: str, ops: list[Op]) -> str:
    """One line of the error: the reason, the number of ops, and three origins or lines."""
    origins = list(dict.fromkeys(op.origin or op.line or op.outputs[0].name for op in ops))
    shown = ", ".join(origins[:3]) + (f" and {len(origins) - 3} more" if len(origins) > 3 else "")
    return f"{reason} ({len(ops)} time{'s' if len(ops) > 1 else ''}: at {shown})"


def _sizes(graph: Graph, refused: Collection[Op], host_sizes: Mapping[str, Dim]) -> Iterable[str]:
    """Errors for sizes that no input's axis and no moec.size determines.

    Sizes of the outputs of a `refused` op are left out: that op is reported already.
    """
    input_sizes = {
        dim.name for v in graph.inputs for dim in v.shape if isinstance(dim, sympy.Symbol)
    }
    input_sizes |= {str(op.attrs["name"]) for op in graph.ops if op.name == "moec.size"}
    reported: set[str] = set()
    for op in graph.ops:
        for value in op.outputs:
            named = names(*value.shape)
            named |= names(*(host_sizes[name] for name in named & host_sizes.keys()))
            unknown = named - host_sizes.keys() - input_sizes - reported
            for name in sorted(unknown) if op not in refused else ():
                yield (
                    f"size {name} of {value.name} depends on the data "
                    f"(made by {op.name} at {op.origin or op.outputs[0].name})"
                )
            reported |= unknown
    for value in graph.inputs:
        for name in sorted(_hidden(value) - input_sizes - reported):
            yield f"size {name} is not an axis of any input by itself, only part of {value}"
            reported.add(name)


def fixed(graph: Graph, host_sizes: Mapping[str, Dim] = MappingProxyType({})) -> Iterable[str]:
    """Errors for sizes that an export fixed although they vary: code compiled from such a graph
    would read and write outside of its tensors."""
    environments = _environments(graph, host_sizes)
    for op in graph.ops:
        rule = EMIT.get(op.name)
        if rule is None or rule.point is None:
            continue
        out = op.outputs[0]
        for value in op.inputs:
            pairs: list[tuple[Dim, Dim]] = []
            if rule.view:
                pairs = [(product(value.shape), product(out.shape))]
            elif rule.same_position and len(value.shape) <= len(out.shape):
                pairs = list(zip(reversed(value.shape), reversed(out.shape), strict=False))
            for size, out_size in pairs:
                if _differ(size, out_size, environments, broadcast=not rule.view):
                    yield (
                        f"operator {op.name} at {op.origin or out.name} gives {out.type} of "
                        f"{value.type}: torch.export fixed a size that varies; limit that size in "
                        "dynamic_shapes"
                    )
                    return


def _environments(graph: Graph, host_sizes: Mapping[str, Dim]) -> list[dict[str, int]]:
    """Some values of every size within its bounds."""
    size_names = {name for v in graph.values() for name in names(*v.shape)}
    size_names |= names(*host_sizes.values())
    environments = []
    for turn in range(len(_TRIED)):
        env = {}
        for index, name in enumerate(sorted(size_names - host_sizes.keys())):
            bounds = graph.bounds.get(name, Bounds())
            wish = max(_TRIED[(turn + index) % len(_TRIED)], bounds.low)
            env[name] = wish if bounds.high is None else min(wish, bounds.high)
        env = nearest_allowed(graph.bounds, env)
        with suppress(IRError):  # a logarithm of 0
            env |= {name: evaluate_dim(size, env) for name, size in host_sizes.items()}
            environments.append(env)
    return environments


_TRIED = (1, 2, 7, 33, 129, 1000)


def _differ(size: Dim, out_size: Dim, environments: list[dict[str, int]], broadcast: bool) -> bool:
    if size == out_size or (broadcast and size == 1):
        return False
    for env in environments:
        try:
            a, b = evaluate_dim(size, env), evaluate_dim(out_size, env)
        except IRError:  # a size that is an integer only for some values
            continue
        if a != b and not (broadcast and a == 1):
            return True
    return False


def _hidden(value: Value) -> set[str]:
    return names(*value.shape)
