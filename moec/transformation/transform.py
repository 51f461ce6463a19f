"""`moec.transform`: applies passes that change a model, and returns a PyTorch module.

The changed model can be trained further, and compiled then. Where it still fits its Hugging Face
class, it is a model of this class; otherwise it is a `GraphModule`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.arguments import cast, changes, example_inputs, text, tolerance
from moec.capture import Captured
from moec.capture.calls.call import ModuleCall
from moec.capture.doors import capture_source, open_source
from moec.capture.hub import local_model
from moec.capture.source import Source
from moec.dtypes import FLOATS
from moec.errors import NoMatch, UsageError, VerificationError
from moec.interpret.graph_module import GraphModule
from moec.ir.graph import Program, stage_of
from moec.options import check_options
from moec.passes.calibration.budget import parse_budget
from moec.passes.calibration.files import check as check_calibration
from moec.passes.calibration.session import Approximate, CalibrationSession
from moec.passes.core.damage import Damage
from moec.passes.core.runner import Declined, PassResult, run
from moec.passes.quantise.codes import QuantisingPass
from moec.pipeline import PassChanges, PassSpec, choose, from_stage, prepare
from moec.torch_private import pytree
from moec.transformation.hf_module import resize_experts
from moec.verify import check as checking

FORMS = ("auto", "class", "graph")


@dataclass(frozen=True)
class Transformation:
    """What was done to a module: `form` is "class" or "graph", `why` is the reason where it is not
    of the source's class, `damage` and `declined` are those of a compilation's report."""

    form: str
    why: str
    damage: tuple[Damage, ...]
    declined: tuple[Declined, ...]


def transform(
    model: Any,
    passes: PassChanges,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    budget: str = "",
    strict: bool = False,
    dtype: str | torch.dtype | None = None,
    dynamic_shapes: Any = None,
    allow_fixed: bool | str | Collection[str] = False,
    form: str = "auto",
    verify: bool | float = True,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
) -> torch.nn.Module:
    """Apply passes that change a model, and return the changed model as a trainable module.

    `model`, `args`, `kwargs`, `passes`, `calib`, `budget`, `strict`, `dtype`, `dynamic_shapes`,
    `allow_fixed`, `verify`, `revision` and `adapters` are those of `moec.compile`; the model itself
    does not change, except for its dtype and eval mode. The result computes what `moec.compile`
    would with the same passes, is called like the model, and can be compiled, or transformed,
    again.

    `form="class"` requires a module of the model's own Hugging Face class, which can be saved with
    save_pretrained. That is possible where experts were pruned to one number in all layers. "graph"
    requires a `moec.interpret.graph_module.GraphModule`, which can represent every result; "auto"
    uses the class where it fits. `module.transformation` has the form, the reason for it, and the
    measured damage.

    Raises what `moec.compile` raises, and UsageError where `form="class"` does not fit.
    """
    if form not in FORMS:
        raise UsageError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    check_options(
        {"dynamic_shapes": dynamic_shapes, "allow_fixed": allow_fixed, "adapters": adapters}
    )
    chosen = _chosen(changes(passes))
    check_calibration(calib)
    limits = parse_budget(text("budget", budget))
    if strict and not budget:
        raise UsageError("strict fails when the budget is exceeded: give budget too")
    limit = tolerance(verify)
    with local_model(model, revision) as opened:
        source = cast(open_source(opened, *example_inputs(args, kwargs), adapters), dtype)
        captured = capture_source(source, dynamic_shapes, allow_fixed)
        session = CalibrationSession(calib, source.files, limits, strict)
        stage = stage_of(captured.program.graph)
        pass_results = run(
            captured.program, from_stage(prepare(chosen, session), stage), stage=stage
        )
        program = pass_results[-1].program

        result: torch.nn.Module | None = None
        why = "form='graph' was given"
        if form != "graph":
            try:
                result = resize_experts(source.model, session.lineages)
                _same_results(result, source, captured, pass_results, limit)
            except NoMatch as reason:
                result, why = None, str(reason)
                if form == "class":
                    raise UsageError(
                        f"{source.name} can no longer be an instance of its class: {why}"
                    ) from None
        shape = "graph" if result is None else "class"
        if result is None:
            trainable = _trainable(source.model, program)
            example = (source.args, dict(source.kwargs))
            result = GraphModule(
                program, trainable, example, captured.structure, why, captured.signature
            )
            if verify is not False:
                checking.check(captured, _runner(captured, result.run), pass_results, limit)
        result.transformation = Transformation(  # type: ignore[assignment]
            shape,
            "" if shape == "class" else why,
            tuple(pass_result.damage for pass_result in pass_results if pass_result.damage),
            tuple(dict.fromkeys(d for pass_result in pass_results for d in pass_result.declined)),
        )
        return result


def _chosen(passes: PassChanges) -> tuple[PassSpec, ...]:
    """The passes that recognise blocks, and those requested. Raises UsageError where none of them
    changes the model, or where one stores codes."""
    for item in [passes] if isinstance(passes, str) else passes:
        if item == "+quantise-experts" or isinstance(item, QuantisingPass):
            raise UsageError(
                "quantise-experts stores weights as codes, which have no gradient: train the "
                "module, and quantise when it is compiled, with quant=..."
            )
    chosen = choose(0, passes)
    indices = [i for i, pass_ in enumerate(chosen) if isinstance(pass_, Approximate)]
    if not indices:
        raise UsageError(
            "passes has no pass that changes the model, so there is nothing to transform; see "
            "moec list passes"
        )
    return chosen[: indices[-1] + 1]


def _trainable(source: Any, program: Program) -> dict[str, bool]:
    """For each weight that is a parameter, whether it is trained: as in the source, and for floats
    that a pass computed, as the weight that they came from."""
    if isinstance(source, torch.nn.Module):
        named = source.named_parameters(remove_duplicate=False)
        buffers = {name for name, _ in source.named_buffers(remove_duplicate=False)}
    else:
        named, buffers = source.named_parameters(), {name for name, _ in source.named_buffers()}
    if isinstance(source, GraphModule):
        names = {key: name for name, key in source.registered_names.items()}
        requires_grad = {names[key]: p.requires_grad for key, p in named}
        buffers = {names[key] for key in buffers}
    else:
        requires_grad = {name: p.requires_grad for name, p in named}
    trainable: dict[str, bool] = {}
    for value in program.graph.params:
        origin = re.sub(r"_\d+$", "", value.name)
        if value.name in requires_grad:
            trainable[value.name] = requires_grad[value.name]
        elif value.dtype in FLOATS and value.name not in buffers and origin not in buffers:
            trainable[value.name] = requires_grad.get(origin, True)
    return trainable


def _runner(captured: Captured, run: Any) -> checking.Run:
    """`run(tensors)` by the names of the graph's inputs and outputs, without gradients."""
    graph = captured.program.graph
    names = [value.name for value in graph.inputs]

    def by_name(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            results = run([inputs[name] for name in names])
        return {v.name: t for v, t in zip(graph.outputs, results, strict=True)}

    return by_name


def _same_results(
    module: torch.nn.Module,
    source: Source,
    captured: Captured,
    pass_results: Sequence[PassResult],
    limit: float | None,
) -> None:
    """Raises NoMatch where the module does not compute what the passes' graph does."""
    call = ModuleCall(module, source.args, source.kwargs)

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves(call(*tensors))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    try:
        checking.check(captured, _runner(captured, run), pass_results, limit, empty=False)
    except VerificationError as error:
        raise NoMatch(
            f"with these experts its class computes different outputs ({error})"
        ) from None
