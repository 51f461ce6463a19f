"""Captures a model with the first layers of each kind, and repeats their graphs for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.captured import Captured
from moec.capture.repeated.alike import LayerList, layer_lists, shortened
from moec.capture.request import CaptureRequest
from moec.capture.state.reach import values_kept
from moec.errors import CaptureError
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.sizes.dims import symbols
from moec.oracle.agree import agree
from moec.oracle.draws import DRAWS

# Repeats the graph of a layer for others that are like it.
#
# In the graph of the first layers, the ops of each layer are one segment. It reads one result of
# the segment before it, weights of its layer, and values from before the first layer. Where the
# segments of like layers are equal, one of them is repeated for each layer that was not traced.


class NotRepeated(CaptureError):
    """Layers are not repeated, and why."""


@dataclass(frozen=True)
class _Segment:
    """The ops of the layer at `path`, and the layer's weights. `carried` is what it reads of the
    layer before it, None for the first layer, and `result` what is read of it."""

    path: str
    ops: tuple[Op, ...]
    params: tuple[Value, ...]
    carried: Value | None
    result: Value

    def moved(self, name: str, path: str) -> str:
        """A name within this layer as one within the layer at `path`; other names unchanged."""
        within = f"{name}.".startswith(f"{self.path}.")
        return path + name.removeprefix(self.path) if within else name


def unrolled(program: Program, layers: LayerList, weights: Mapping[str, torch.Tensor]) -> Program:
    """The program of the first layers, continued with those that were not traced. `weights` has
    the parameters and buffers of the model by name. Raises NotRepeated."""
    graph = program.graph
    segments, end = _segments(graph, layers)
    repeated = {kind: segments[layers.kinds.index(kind, 1)] for kind in layers.untraced}
    for segment, kind in zip(segments, layers.kinds, strict=False):
        if kind in repeated:
            _check_equal(repeated[kind], segment)
    _check_sizes_and_weights(repeated.values(), program, weights)
    ops, params, last = list(graph.ops[:end]), list(graph.params), segments[-1]
    for number, kind in enumerate(layers.untraced, layers.traced):
        last = _repeat(repeated[kind], layers.path_of(number), last.result)
        ops += last.ops
        params += last.params
    final = {segments[-1].result: last.result}
    ops += (replace(op, inputs=_mapped(op.inputs, final)) for op in graph.ops[end:])
    outputs = _mapped(graph.outputs, final)
    named = {**weights, **program.weights}
    continued = replace(graph, ops=tuple(ops), params=tuple(params), outputs=outputs)
    return Program(continued, {param.name: named[param.name] for param in params})


def _segments(graph: Graph, layers: LayerList) -> tuple[list[_Segment], int]:
    """The segments of the first layers, and the position of the first op after them."""
    numbers = [_number(op.origin, layers) for op in graph.ops]
    positions = [position for position, number in enumerate(numbers) if number is not None]
    start, end = min(positions, default=0), max(positions, default=-1) + 1
    if None in numbers[start:end] or numbers[start:end] != sorted(numbers[start:end], key=str):
        raise NotRepeated("other code runs between them")
    source = {value: n for op, n in zip(graph.ops, numbers, strict=True) for value in op.outputs}
    reads = [(value, n) for op, n in zip(graph.ops, numbers, strict=True) for value in op.inputs]
    reads += ((value, None) for value in graph.results)
    exchanged = {(source[v], n, v) for v, n in reads if source.get(v) not in (None, n)}
    results = {writer: value for writer, _, value in exchanged}
    after = {n: n + 1 if n + 1 < layers.traced else None for n in range(layers.traced)}
    if exchanged != {(n, after[n], results.get(n)) for n in after}:
        raise NotRepeated("they exchange more than one tensor")
    return [
        _Segment(
            path := layers.path_of(n),
            tuple(op for op, number in zip(graph.ops, numbers, strict=True) if number == n),
            tuple(param for param in graph.params if param.name.startswith(f"{path}.")),
            results.get(n - 1),
            results[n],
        )
        for n in after
    ], end


def _number(origin: str, layers: LayerList) -> int | None:
    """The number of the first layer that an op of this origin belongs to."""
    paths = (f"{layers.path_of(number)}." for number in range(layers.traced))
    return next((n for n, path in enumerate(paths) if f"{origin}.".startswith(path)), None)


def _check_equal(one: _Segment, other: _Segment) -> None:
    """Raises NotRepeated unless two segments compute the same with weights of their own."""
    params = {param.name: param for param in other.params}
    same = {param: params.get(one.moved(param.name, other.path), param) for param in one.params}
    if one.carried is not None and other.carried is not None:
        same[one.carried] = other.carried
    equal = len(one.ops) == len(other.ops)
    for op, twin in zip(one.ops, other.ops, strict=False):
        equal = equal and _text(op, one) == _text(twin, other)
        for value, counterpart in zip(op.inputs, twin.inputs, strict=False):
            other_than_carried = counterpart if value is one.carried else value
            equal = equal and same.setdefault(value, other_than_carried) is counterpart
        same.update(zip(op.outputs, twin.outputs, strict=False))
    if not equal or same.get(one.result) is not other.result:
        raise NotRepeated(f"the graphs of {one.path} and {other.path} differ")


def _text(op: Op, segment: _Segment) -> str:
    """What an op computes, without the names of its values."""
    types = [value.type for value in op.outputs]
    body = op.body and [(_text(each, segment), each.inputs) for each in op.body.ops]
    origin = segment.moved(op.origin, "")
    return f"{op.name} {len(op.inputs)} {dict(op.attrs)} {types} {origin} {body}"


def _check_sizes_and_weights(
    segments: Iterable[_Segment], program: Program, weights: Mapping[str, torch.Tensor]
) -> None:
    """Raises NotRepeated where a size depends on data, or a weight is not one of the model's."""
    for segment in segments:
        shapes = (value.shape for op in segment.ops for value in op.outputs)
        if not {name for s in shapes for d in s for name in symbols(d)} <= {*program.graph.bounds}:
            raise NotRepeated(f"data decide sizes in {segment.path}")
        for param in segment.params:
            original, weight = weights.get(param.name), program.weights[param.name]
            if original is None or weight.data_ptr() != original.data_ptr():
                raise NotRepeated(f"{param.name} is computed")


def _repeat(segment: _Segment, path: str, carried: Value) -> _Segment:
    """A segment for the layer at `path`, which reads `carried`."""

    def moved(op: Op) -> Op:
        body = op.body and replace(op.body, ops=tuple(map(moved, op.body.ops)))
        return replace(op, origin=segment.moved(op.origin, path), body=body)

    number = path.rpartition(".")[2]
    params = tuple(Value(segment.moved(p.name, path), p.type) for p in segment.params)
    new = dict(zip(segment.params, params, strict=True))
    assert segment.carried is not None
    new[segment.carried] = carried
    ops = []
    for op in segment.ops:
        outputs = tuple(Value(f"{value.name}_layer{number}", value.type) for value in op.outputs)
        ops.append(replace(moved(op), inputs=_mapped(op.inputs, new), outputs=outputs))
        new.update(zip(op.outputs, outputs, strict=True))
    return _Segment(path, tuple(ops), params, carried, new[segment.result])


def _mapped(values: Sequence[Value], others: Mapping[Value, Value]) -> tuple[Value, ...]:
    return tuple(others.get(value, value) for value in values)


_log = logging.getLogger(__name__)


def capture_repeated(request: CaptureRequest, capture: Callable[[], Captured]) -> Captured | None:
    """The capture that `capture` makes of the first layers, continued to all of them and compared
    with the whole model; None where layers have to be traced one by one.

    What `capture` proves about sizes and inputs holds for layers that are alike: it is not proved
    again.
    """
    module = request.call.module
    with PROCESS_STATE, values_kept(module):
        try:
            lists = layer_lists(request.call)
        except Exception as error:  # whatever the module raises: its capture says so
            _log.info("alike layers are traced one by one: %s", type(error).__name__)
            return None
        if not lists:
            return None
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights = {name: tensor.detach() for name, tensor in held.items()}  # results keep none
        try:
            with shortened(lists):
                captured = capture()
            program = captured.program
            for layers in lists:
                program = unrolled(program, layers, weights)
        except (CaptureError, NotRepeated) as reason:
            _log.info("alike layers are traced one by one: %s", reason)
            return None
        if not agree(program, captured.eager, captured.example, DRAWS[:1]):
            _log.info("alike layers are traced one by one: repeated, they compute something else")
            return None
    for each in lists:
        _log.info("%d of the %d layers of %s were traced", each.traced, len(each.kinds), each.path)
    return replace(captured, program=program)
