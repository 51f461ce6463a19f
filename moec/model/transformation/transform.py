"""`moec.transform`: applies passes that change a model, and returns a PyTorch module.

The changed model can be trained further, and compiled then. Where it still fits its Hugging Face
class, it is a model of this class; otherwise it is a `GraphModule`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec.arguments import cast, changes, example_inputs, text, tolerance
from moec.capture import Captured
from moec.capture.calls.call import ModuleCall
from moec.capture.doors import capture_source, open_source
from moec.capture.hub import local_model
from moec.capture.source import Source
from moec.dtypes import FLOATS
from moec.errors import NoMatch, UsageError, VerificationError
from moec.ir.graph import Program, Value, stage_of
from moec.ir.interpret.graph_module import GraphModule
from moec.options import check_options
from moec.passes.calibration.budget import parse_budget
from moec.passes.calibration.evaluator import ExpertLineage
from moec.passes.calibration.files import check as check_calibration
from moec.passes.calibration.session import Approximate, CalibrationSession
from moec.passes.core.damage import Damage
from moec.passes.core.moe_layer import Layer
from moec.passes.core.runner import Declined, PassResult, run
from moec.passes.quantise.codes import QuantisingPass
from moec.pipeline import PassChanges, PassSpec, choose, from_stage, prepare
from moec.torch_private import pytree
from moec.verify import check as checking

# Builds a Hugging Face model of the same class with fewer experts.
#
# Which tensors have an axis of experts is found from the class: their shapes change when the number
# of experts in the configuration does. No model family needs its own code.

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
)
"""The names by which configurations have the number of experts of a layer."""


def resize_experts(model: Any, lineages: Mapping[Value, ExpertLineage]) -> nn.Module:
    """A copy of the model with only the experts that `lineages` names.

    Raises NoMatch where experts are merged or new, where layers keep different numbers of experts,
    or where the class has other tensors than the model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "save_pretrained"):
        raise NoMatch("it is not a model of transformers")
    if getattr(model, "config", None) is None:
        raise NoMatch(f"{type(model).__name__} has no configuration")
    kept_experts = {t.layer.name: _experts_left(t) for t in lineages.values()}
    before = {t.layer.count for t in lineages.values() if isinstance(t.layer, Layer)}
    after = {len(experts) for experts in kept_experts.values()}
    if len(before) > 1 or len(after) > 1:
        raise NoMatch(
            f"its layers have {_numbers(after)} experts left of {_numbers(before)}, and the "
            "configuration has one number for all"
        )
    if before == after:
        raise NoMatch("no layer was changed")
    config = _recounted(model.config, before.pop(), after.pop())
    with torch.device("meta"):
        module: nn.Module = type(model)(config)
    _fill(module, model, kept_experts)
    module.train(model.training)
    if (generation := getattr(model, "generation_config", None)) is not None:
        module.generation_config = copy.deepcopy(generation)
    return module


def _experts_left(lineage: ExpertLineage) -> list[int]:
    name, members = lineage.layer.name, lineage.members
    if not isinstance(lineage.layer, Layer):
        raise NoMatch(f"{name} was dense, and its class has no experts in this layer")
    if members is None:
        raise NoMatch(f"{name} has lost its router")
    if any(len(sources) != 1 for sources in members):
        raise NoMatch(f"{name} routes to experts that are several of the model's")
    return [sources[0] for sources in members]


def _numbers(counts: set[int]) -> str:
    return ", ".join(map(str, sorted(counts)))


def _recounted(config: Any, before: int, after: int) -> Any:
    """A copy of the configuration with `after` instead of `before` experts."""
    config = copy.deepcopy(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = [name for name in COUNTS if getattr(text, name, None) == before]
    if not names:
        raise NoMatch(f"its configuration has none of {', '.join(COUNTS)} that is {before}")
    for name in names:
        setattr(text, name, after)
    return config


def _fill(smaller: nn.Module, model: nn.Module, kept_experts: Mapping[str, Sequence[int]]) -> None:
    """Copies the model's tensors into `smaller`, with only the kept experts along their axes."""
    shapes = {name: tensor.shape for name, tensor in _tensors(smaller).items()}
    held = _tensors(model)
    if set(held) != set(shapes):
        odd = sorted(set(held) ^ set(shapes))[0]
        raise NoMatch(f"its class and the model differ in {odd}")
    for name, tensor in held.items():
        cut = _cut(name, tensor.detach(), shapes[name], kept_experts)
        owner, _, last = name.rpartition(".")
        module = smaller.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(cut, requires_grad=tensor.requires_grad))
        else:
            setattr(module, last, cut)
    smaller.tie_weights()  # type: ignore[operator]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cut(
    name: str, tensor: torch.Tensor, shape: torch.Size, kept_experts: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor.clone()
    layer = next(
        (layer_name for layer_name in kept_experts if name.startswith(f"{layer_name}.")), None
    )
    if layer is None:
        raise NoMatch(f"{name} has an axis of experts, and belongs to no layer of the graph")
    if tensor.ndim != len(shape):
        raise NoMatch(f"{name} is {list(tensor.shape)}, and {list(shape)} with fewer experts")
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old != new:
            if new != len(kept_experts[layer]):
                raise NoMatch(
                    f"{name} is {list(tensor.shape)}, and {list(shape)} with fewer experts"
                )
            tensor = tensor.index_select(axis, torch.tensor(kept_experts[layer]))
    return tensor


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
    requires a `moec.ir.interpret.graph_module.GraphModule`, which can represent every result;
    "auto" uses the class where it fits. `module.transformation` has the form, the reason for
    it, and the measured damage.

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
