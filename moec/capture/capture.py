"""A module and example arguments -> a program, and how to call it as the module is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from moec.capture.exported import decompose, to_program
from moec.capture.huggingface import experts_as_ops
from moec.capture.shapes import (
    default_shapes,
    name_symbols,
    wished_bounds,
    wished_names,
)
from moec.errors import CaptureError, IRError
from moec.evaluate import evaluate
from moec.ir import Program
from moec.sizes import Bounds


@dataclass(frozen=True)
class Captured:
    """A program as captured, and what ties it to the module it came from.

    `eager(*tensors)` runs the module on the graph's inputs in their order and gives the graph's
    outputs as tensors; `structure` rebuilds the module's own output from them. `fixed` names
    the axes that the user may have expected to vary, but which the model fixes.
    """

    program: Program
    eager: Callable[..., tuple[torch.Tensor, ...]] | None
    example: tuple[torch.Tensor, ...]
    structure: pytree.TreeSpec | None
    fixed: tuple[str, ...] = ()


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    bounds: Mapping[str, Bounds] | None = None,
) -> Captured:
    """Export `model` with example arguments and convert it.

    `dynamic_shapes` is torch.export's; None lets batch and sequence axes vary
    (`moec.capture.shapes`). `bounds` limits named sizes. Raises CaptureError where the model
    cannot be exported, with torch's reason.
    """
    if isinstance(model, ExportedProgram):
        return _convert(model, None, (), {}, None, bounds)
    kwargs = dict(kwargs or {})
    model.eval()
    for leaf in pytree.tree_leaves((tuple(args), kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu":
            raise CaptureError(f"an input is on {leaf.device}; move the inputs to the CPU")
    if dynamic_shapes is None:
        positional, named = default_shapes(tuple(args)), default_shapes(kwargs)
        names: list[tuple[str | None, ...]] = []
    else:
        positional, named = _split(model, args, kwargs, dynamic_shapes)
        names = wished_names((positional, named), (tuple(args), kwargs))
    shapes = positional if not kwargs else _by_name(model, args, positional, named)
    try:
        with (
            torch.no_grad(),
            experts_as_ops(model),
            symbolic_config.patch(backed_size_oblivious=True, use_duck_shape=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(
                model, tuple(args), kwargs, dynamic_shapes=shapes, strict=False
            )
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {error}"
        ) from error
    limits = wished_bounds(dynamic_shapes) | dict(bounds or {})
    return _convert(exported, model, tuple(args), kwargs, names, limits)


def _split(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any
) -> tuple[Any, Any]:
    """`shapes` (a tuple for the arguments, or a dict by parameter name) for args and kwargs."""
    if isinstance(shapes, list | tuple):
        if len(shapes) != len(args) + len(kwargs):
            raise CaptureError(
                f"dynamic_shapes has {len(shapes)} entries for {len(args) + len(kwargs)} arguments"
            )
        return tuple(shapes[: len(args)]), dict(zip(kwargs, shapes[len(args) :], strict=True))
    import inspect

    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    unknown = set(shapes) - set(names) - set(kwargs)
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {', '.join(sorted(unknown))}, but the arguments are "
            f"{', '.join([*names, *kwargs])}"
        )
    return tuple(shapes.get(n) for n in names), {n: shapes.get(n) for n in kwargs}


def _by_name(
    model: torch.nn.Module, args: Sequence[Any], positional: Sequence[Any], named: Any
) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    return dict(zip(names, positional, strict=True)) | dict(named)


def _convert(
    exported: ExportedProgram,
    model: torch.nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[tuple[str | None, ...]] | None,
    bounds: Mapping[str, Bounds] | None,
) -> Captured:
    example_args, example_kwargs = exported.example_inputs or ((), {})
    example = tuple(
        leaf
        for leaf in pytree.tree_leaves((example_args, example_kwargs))
        if isinstance(leaf, torch.Tensor)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = decompose(exported)
    wanted = [
        node.meta["val"]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in exported.graph_signature.user_inputs
    ]
    tensors = [value for value in wanted if isinstance(value, torch.Tensor)]
    wishes = list(names) if names else [() for _ in tensors]
    rename = name_symbols(
        [(t.shape, w) for t, w in zip(tensors, wishes, strict=True)]  # type: ignore[misc]
    )
    structure = exported.call_spec.out_spec
    program = to_program(exported, rename=rename, bounds=bounds, output_names=_names(structure))
    eager = None if model is None else _eager(model, args, kwargs)
    if eager is not None and not program.graph.states:
        program = _allow_one(program, eager, example)
    return Captured(program, eager, example, structure, _fixed(program))


def _names(structure: pytree.TreeSpec) -> tuple[str, ...]:
    """Names for the outputs: keys where the module returns a mapping, else output_0, …"""
    count = structure.num_leaves
    whole = pytree.tree_unflatten([_Leaf(i) for i in range(count)], structure)
    if isinstance(whole, Mapping):
        named = [""] * count
        for key, part in whole.items():
            leaves = [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, _Leaf)]
            for place, leaf in enumerate(leaves):
                named[leaf.index] = str(key) if len(leaves) == 1 else f"{key}_{place}"
        return tuple(named)
    return ("output",) if count == 1 else tuple(f"output_{i}" for i in range(count))


@dataclass(frozen=True)
class _Leaf:
    index: int


def _eager(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        positional, named = pytree.tree_unflatten(filled, spec)
        with torch.no_grad():
            result = model(*positional, **named)
        return tuple(t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))

    return run


def _allow_one(
    program: Program,
    eager: Callable[..., tuple[torch.Tensor, ...]],
    example: Sequence[torch.Tensor],
) -> Program:
    """Lower bounds of 2 that only torch.export's habit of treating 1 apart has set.

    Where the graph, run at size 1, agrees with the module at size 1, the bound becomes 1.
    """
    graph = program.graph
    bounds = dict(graph.bounds)
    for name, limits in graph.bounds.items():
        if limits.low != 2:
            continue
        tensors = [
            _cut(tensor, [axis for axis, dim in enumerate(value.shape) if str(dim) == name])
            for value, tensor in zip(graph.inputs, example, strict=True)
        ]
        try:
            ours, theirs = evaluate(graph, tensors, program.weights), eager(*tensors)
            agree = all(
                torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
                for a, b in zip(ours, theirs, strict=True)
            )
        except (RuntimeError, IRError, IndexError, ValueError):
            agree = False  # the model itself cannot run at this size: the bound stands
        if agree:
            bounds[name] = Bounds(1, limits.high)
    return Program(replace(graph, bounds=bounds), program.weights)


def _cut(tensor: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _fixed(program: Program) -> tuple[str, ...]:
    states = {state.before for state in program.graph.states}
    own = [value for value in program.graph.inputs if value not in states]
    return tuple(
        f"{value.name} axis {axis} is always {size}"
        for value in own
        for axis, size in enumerate(value.shape)
        if isinstance(size, int) and (axis < len(value.shape) - 1 or value.dtype.startswith("i"))
    )
