"""A module and example arguments -> a program, and how to call it as the module is called."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from moec.capture.agreement import Eager, agree, allow_one, cut, refuted
from moec.capture.call import PREFIX, Call, casts_done, named_arguments, tensor_names
from moec.capture.conditions import Conditions
from moec.capture.exported import decompose, to_program
from moec.capture.fixed import causes, fixed
from moec.capture.fixed import notes as fixed_notes
from moec.capture.gc_pause import seldom_collected
from moec.capture.guard_text import guards_in_text
from moec.capture.guards import guards_of, located
from moec.capture.huggingface import experts_as_ops
from moec.capture.lengths import Axis, Group
from moec.capture.lightning import lightning_as_ops
from moec.capture.loops import Met, every_expert_hit
from moec.capture.numbers import export_keeping_sizes
from moec.capture.scans import scans_as_ops
from moec.capture.settlement import required, settled
from moec.capture.shapes import Axes, default_wishes, name_symbols, wished_axes, wished_bounds
from moec.capture.states import States, detached
from moec.capture.sym_bools import sym_bools_answered
from moec.capture.trials import quiet
from moec.capture.widening import widen
from moec.errors import CaptureError
from moec.interpret.graph_module import GraphModule
from moec.ir.dims import Bounds
from moec.ir.graph import Program

EXPORTS = threading.RLock()
"""Held while torch exports, and its modules and the standard streams are other ones meanwhile: all
threads share those, so models that are compiled side by side are exported one after the other."""


@dataclass(frozen=True)
class Captured:
    """A program as captured, and what ties it to the module it came from.

    `eager(*tensors)` runs the source on the graph's own inputs in their order (states left
    out) and gives the graph's outputs; `structure` rebuilds the source's own result from them.
    `fixed` names axes that the caller may have expected to vary, but which the model fixes, and
    what guards of the export came to. `is_graph` says that the source is the graph itself.
    `described` names modules that were captured as what they do, and `notes` says so.
    """

    program: Program
    eager: Eager
    example: tuple[torch.Tensor, ...]
    structure: pytree.TreeSpec
    fixed: tuple[str, ...] = ()
    is_graph: bool = False
    notes: tuple[str, ...] = ()
    described: tuple[str, ...] = ()


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    bounds: Mapping[str, Bounds] | None = None,
    allow_fixed: bool | str | Collection[str] = False,
) -> Captured:
    """Export `model` with example arguments and convert it.

    `dynamic_shapes` is torch.export's; None lets batch and sequence axes vary
    (`moec.capture.shapes`). `bounds` limits named sizes. `allow_fixed` names inputs whose sizes
    may be fixed at the example's. Raises CaptureError where the model cannot be exported, with
    torch's reason, or where sizes of the example decide what is computed.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError("the sizes of an exported program are fixed: export it anew")
        return _from_export(model, args, kwargs, bounds)
    model.eval()
    if isinstance(model, GraphModule):
        return _from_graph(model, args, kwargs, dynamic_shapes)
    arguments = named_arguments(model, args, kwargs)
    call = Call(model, args, kwargs)
    for name, tensor in zip(tensor_names(arguments), call.tensors, strict=True):
        _check_device(f"input {name}", tensor)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_device(name, tensor)
    if dynamic_shapes is None:
        wishes, last = default_wishes(call.tensors)
    else:
        wishes, last = wished_axes(arguments, dynamic_shapes), []
    joining = [Axis(*axis) for axis in last]
    asked = wished_bounds(wishes) | dict(bounds or {})
    wrong: list[Group] = []
    while True:
        with EXPORTS, seldom_collected():
            general = widen(call, wishes, joining, [group.axes for group in wrong])
            exported, met = _export(call, general.tensors, general.wishes)
            guards = guards_of(exported, _names(exported, general.wishes, general.groups))
            fixings = causes(exported)
            program, structure = _convert(
                exported, tensor_names(arguments), general.wishes, asked, general.groups
            )
        program, states = detached(program)
        eager = _from_start(states, call)
        more = refuted(program, eager, call.tensors, general)
        if not more:
            break
        wrong += more
    name = type(model).__name__
    if met:
        _check_assumed(name, program, eager, general.tensors, met)
    program, notes = settled(name, program, guards, eager, general.tensors)
    program = allow_one(program, asked, eager, (general.tensors, call.tensors))
    always = fixed(name, program, eager, general.tensors, general.wishes, allow_fixed, fixings)
    return Captured(program, eager, call.tensors, structure, (*always, *notes))


def _check_device(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise CaptureError(f"{name} has no data (it is on the meta device); load the weights first")
    if tensor.device.type != "cpu":
        raise CaptureError(f"{name} is on {tensor.device}; move it to the CPU")


def _from_start(states: States, run: Callable[..., Any]) -> Eager:
    """`run` without gradients, each time from the first states; its results are not states."""

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), states.from_start():
            made = _tensors(run(*tensors))
            return tuple(t.clone() for t in made) if states.live else made

    return eager


def _export(
    call: Call, tensors: Sequence[torch.Tensor], wishes: Sequence[Axes]
) -> tuple[ExportedProgram, Met | None]:
    """torch.export with `tensors`, and what helps it where a module casts itself or loops over
    hit experts.

    The second result says what was taken for granted of such loops.
    """
    name = type(call.module).__name__

    def attempt() -> ExportedProgram:
        return export_keeping_sizes(
            lambda: torch.export.export(
                call, tuple(tensors), dynamic_shapes=(tuple(wishes),), strict=False
            )
        )

    try:
        with (
            torch.no_grad(),
            experts_as_ops(call.module),
            scans_as_ops(call.module),
            lightning_as_ops(call.module),
            casts_done(),
            sym_bools_answered(call.module),
            located(),
            symbolic_config.patch(  # type: ignore[attr-defined]
                backed_size_oblivious=True, use_duck_shape=False
            ),
            warnings.catch_warnings(),
            quiet(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            try:
                return attempt(), None
            except RuntimeError as error:
                if "Couldn't swap" in str(error):
                    call(*tensors)  # a module casts a submodule: let it, then export
                    return _unrolled(attempt)
                if "data-dependent" in str(error):
                    return _unrolled(attempt)
                raise
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{name} cannot be exported: {type(error).__name__}: {_first_lines(error)}"
        ) from error


def _unrolled(attempt: Callable[[], ExportedProgram]) -> tuple[ExportedProgram, Met]:
    """Masks may have a place more than there are experts, for tokens of no expert. Where the
    loop's body has nothing at that place, the module cannot hold such tokens: it is left out."""
    last: set[int] = set()
    while True:
        with every_expert_hit(last) as met:
            try:
                return attempt(), met
            except IndexError:
                if not met.lengths or met.lengths[-1] in last:
                    raise
                last.add(met.lengths[-1])


def _check_assumed(
    name: str, program: Program, eager: Eager, example: Sequence[torch.Tensor], met: Met
) -> None:
    """Raises CaptureError where the module disagrees with what its capture took for granted, or
    where a condition was never seen to skip its rows: then nothing shows that it may be left out.
    """
    if example and not any(tensor.numel() for tensor in example):
        raise CaptureError(
            f"{name} loops over what nonzero() finds, or asks whether a mask is set, and its "
            "example is empty, which shows nothing of what that does; give an example with some "
            "rows"
        )
    if not agree(program, eager, example):
        raise CaptureError(
            f"{name} loops over what nonzero() finds, or asks whether a mask is set, and running "
            "the loop for every index changes the result; write the loop over range(num_experts)"
        )
    seen = Conditions(assumed=False)
    for draw in (example, *_single(program, example)):
        with seen:
            eager(*draw)
        if not agree(program, eager, draw):
            raise CaptureError(
                f"{name} branches on whether a mask is set, and without the branch it gives "
                "something else; compute both sides and choose with torch.where"
            )
    unseen = [str(place) for place in met.conditions.met if place not in seen.skipped]
    if unseen:
        raise CaptureError(
            f"{name} asks whether a mask is set at {', '.join(unseen[:3])}, which no example left "
            "unset: whether the branch matters cannot be told; leave the condition out, or compute "
            "both sides and choose with torch.where"
        )


def _single(program: Program, example: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The first element of every axis that may vary, and the last: few experts have rows."""
    for place in (0, -1):
        yield [
            cut(tensor, [a for a, d in enumerate(value.shape) if not isinstance(d, int)], place)
            for value, tensor in zip(program.graph.inputs, example, strict=False)
        ]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())


def _from_export(
    exported: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    bounds: Mapping[str, Bounds] | None,
) -> Captured:
    """A program that somebody else exported: its own sizes and meaning hold, and its example
    where none is given. The example is empty where there is none at all."""
    spec = exported.call_spec.in_spec
    if args or kwargs:
        given = (tuple(args), dict(kwargs))
        if pytree.tree_structure(given) != spec:
            raise CaptureError(
                "the exported program was not exported with arguments such as these: it takes "
                f"{', '.join(map(str, exported.graph_signature.user_inputs))}"
            )
    else:
        given = exported.example_inputs or ((), {})
    example = _tensors(given)
    names = [str(name) for name in exported.graph_signature.user_inputs]
    guards = guards_in_text(exported, _names(exported, [{} for _ in names]))
    module = exported.module(check_guards=False)

    def run(*tensors: torch.Tensor) -> Any:
        positional, named = pytree.tree_unflatten(list(tensors), spec)
        return module(*positional, **named)

    program, structure = _convert(exported, names, [{} for _ in names], bounds or {})
    program, states = detached(program)
    eager = _from_start(states, run)
    program, notes = required("the exported program", program, guards, example)
    always = fixed_notes(program, len(names))
    return Captured(program, eager, example, structure, (*always, *notes))


def _from_graph(
    model: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Captured:
    """A module that is a graph already: nothing is traced, its weights are as they are now."""
    if dynamic_shapes is not None:
        raise CaptureError("the sizes of a transformed module are fixed: transform it anew")
    example = model.inputs(args, kwargs)

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return model.run(tensors)

    return Captured(model.program, eager, example, model.structure, is_graph=True)


def _convert(
    exported: ExportedProgram,
    names: Sequence[str],
    wishes: Sequence[Axes],
    bounds: Mapping[str, Bounds],
    groups: Iterable[Group] = (),
) -> tuple[Program, pytree.TreeSpec]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = decompose(exported)
    structure = exported.call_spec.out_spec
    program = to_program(
        exported,
        rename=_names(exported, wishes, groups),
        bounds=bounds,
        input_names=names,
        output_names=_output_names(structure),
        prefix=PREFIX,
    )
    return program, structure


def _names(
    exported: ExportedProgram, wishes: Sequence[Axes], groups: Iterable[Group] = ()
) -> dict[str, str]:
    """torch's symbols in the inputs' shapes -> names of the IR."""
    own = exported.graph_signature.user_inputs
    held = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in own]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    return name_symbols(tensors, wishes, [group.axes for group in groups])


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _output_names(structure: pytree.TreeSpec) -> tuple[str, ...]:
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
