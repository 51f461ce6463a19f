"""Leaves each layer the experts and the top-k that a file of choices has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import NoMatch, SetupError, UsageError
from moec.ir.graph import Op, Program, Stage, TensorType, Value
from moec.ir.ops import OPS
from moec.passes.approximate.choices.changeable import (
    NO_CONSTANTS,
    Constants,
    changeable_layers,
    constants_of,
    shared_expert,
)
from moec.passes.approximate.choices.constant_experts import replace_by_constants
from moec.passes.approximate.choices.drop_shared import drop_shared
from moec.passes.approximate.choices.model_choices import (
    LayerChoice,
    ModelChoices,
    choice_lines,
    describe_choices,
    formats_of,
)
from moec.passes.approximate.merge_experts import merge_groups
from moec.passes.approximate.prune_experts import drop_experts, shortage
from moec.passes.approximate.skip_small_weights import skip_small_weights
from moec.passes.approximate.training.recover_routers import RecoverRouters
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import CalibrationSession
from moec.passes.core.moe_layer import Layer, Splice
from moec.passes.core.runner import Kind, Log, OptInPass, PassResult
from moec.passes.quantise.fixed_formats import FixedFormats


@dataclass(frozen=True, eq=False)
class ChooseExperts(OptInPass):
    """Leave layers the experts and the top-k that were chosen for them; report all choices."""

    choices: ModelChoices
    session: CalibrationSession | None = None
    name: ClassVar[str] = "choose-experts"
    source: ClassVar[str] = ""
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    kind: ClassVar[Kind] = Kind.CHANGES

    def run(self, program: Program, log: Log) -> Program:
        if self.session is not None:
            self.session.original = program
        original, ordered, name = program, in_order(self.choices.layers), ""
        try:
            for name, choice in ordered:
                _check(program, name, choice)
            constants = self._constants(program)
            for name, choice in ordered:
                changed = change_experts(program, name, choice, constants)
                if log.spend(f"{name}: {choice.left}"):
                    program = changed
        except NoMatch as why:
            log.decline("choices", f"{name}: {why}")
            return original
        log.says += describe_choices(self.choices)
        log.choices += choice_lines(self.choices)
        return program

    @property
    def needs_data(self) -> bool:
        """Whether choices have constants, which are means of results on data."""
        return any(choice.constant for choice in self.choices.layers.values())

    def _constants(self, program: Program) -> Constants:
        if not self.needs_data:
            return NO_CONSTANTS
        session = self.session
        assert session is not None
        evaluator = Evaluator(program, load_calibration(session.calib, program, session.files))
        return constants_of(program, evaluator, self.choices.layers)


def passes_of(choices: ModelChoices) -> list[OptInPass]:
    """The passes that apply the choices. Raises UsageError for a format that does not exist, and
    for formats of single experts beside dropped ones."""
    fewer = any(0 < len(choice.experts) < choice.of for choice in choices.layers.values())
    if fewer and any(choice.experts for choice in choices.products.values()):
        raise UsageError(
            "choices: experts have formats by number, and a layer drops, merges or replaces some, "
            "which changes the numbers: leave out one of both"
        )
    shapes = {name: (choice.rows, choice.columns) for name, choice in choices.products.items()}
    formats = FixedFormats(formats_of(choices.products), shapes, choices.codes == "gptq")
    recovery = [RecoverRouters(choices.recover)] if choices.recover else []
    return [ChooseExperts(choices), *([formats] if formats.formats else []), *recovery]


def check_applied(pass_results: Sequence[PassResult]) -> None:
    """Raises UsageError where choices were not those of the model."""
    for declined in (declined for result in pass_results for declined in result.declined):
        if declined.where == "choices":
            raise SetupError(
                f"choices: {declined.reason}: give those that moec optimize wrote for this model"
            )


def in_order(layers: Mapping[str, LayerChoice]) -> list[tuple[str, LayerChoice]]:
    """The choices in the order in which they can be applied: a shared expert is recognised beside
    a layer as it is."""
    return sorted(layers.items(), key=lambda item: bool(item[1].experts))


def change_experts(
    program: Program, name: str, choice: LayerChoice, constants: Constants = NO_CONSTANTS
) -> Program:
    """The program in which a layer has the experts and the top-k of a choice, a token skips those
    that it says, and others give their `constants`. Raises NoMatch."""
    if not choice.experts:
        mean = constants[name] if choice.constant else None
        return drop_shared(program, shared_expert(program, name), mean)
    layer = changeable_layers(program, Log())[name]
    if choice.merged:
        program = merge_groups(program, layer, choice.merged, choice.usage)
    elif len(choice.experts) < layer.count and not choice.constant:
        program = drop_experts(program, layer, choice.experts).program
    if choice.top_k < layer.routing.k:
        program = reduce_top_k(program, changeable_layers(program, Log())[name], choice.top_k)
    layer = changeable_layers(program, Log())[name]
    if choice.threshold:
        program = skip_small_weights(program, layer, choice.threshold)
    if not choice.constant:
        return program
    # What skips small weights leaves the block behind the router as it is in `layer`.
    return replace_by_constants(program, layer, choice.experts, constants[name])


def _check(program: Program, name: str, choice: LayerChoice) -> None:
    """Raises NoMatch where the layer is not that of the choice, or cannot route so."""
    if not choice.experts:
        shared_expert(program, name)
        if (choice.of, choice.top_k, choice.top_k_before) != (1, 0, 1) or choice.threshold:
            raise NoMatch("without a shared expert there are 0 of 1 experts, 0 of 1 for each token")
        return
    layer = changeable_layers(program, Log()).get(name)
    if layer is None:
        raise NoMatch("the model has no such layer")
    k, groups = layer.routing.k, layer.routing.groups
    if (choice.of, choice.top_k_before) != (layer.count, k):
        raise NoMatch(f"the model has {layer.count} experts there, {k} for each token")
    each, rest = divmod(len(choice.experts), groups)
    lacks = bool(rest or shortage(layer, each)) and not choice.constant
    ordered = choice.experts == tuple(sorted(set(choice.experts) & set(range(layer.count))))
    if choice.merged or choice.usage:
        if choice.constant:
            raise NoMatch("experts are merged or constant: leave out merged and usage, or constant")
        members = sorted(e for group in choice.merged for e in group)
        firsts = tuple(group[0] for group in choice.merged if group)
        every, counts = list(range(layer.count)), len(choice.usage)
        if (members, firsts, counts) != (every, choice.experts, layer.count):
            raise NoMatch(
                f"merged and usage are those of {layer.count} experts, each in one group, of which "
                "experts has the first"
            )
    if not ordered or lacks or not 1 <= choice.top_k <= k:
        raise NoMatch(f"no router of top {k} chooses {choice.top_k} of experts {choice.experts}")


# Routes each token of a layer to fewer experts.
#
#     w, ids = moe.route(logits) <k=8>               w, ids = moe.route(logits) <k=6>
#     rows, order, ends = moe.dispatch(x, ids)  ->   rows, order, ends = moe.dispatch(x, ids)
#     y = moe.combine(out, order, w) <k=8>           y = moe.combine(out, order, w) <k=6>
#
# The experts of a token are the best of those it had. A router that renormalises gives them larger
# weights; any other leaves the weights of the dropped ones out.
_CASTS = ("aten._to_copy.default", "aten.alias.default")
_BLOCK = ("moe.route", "moe.dispatch", "moe.experts", "moe.combine")


def reduce_top_k(program: Program, layer: Layer, k: int) -> Program:
    """The program in which each token takes only the best `k` of the layer's choices.

    Raises NoMatch for a router whose k is more than a number, and for other readers of its choices.
    """
    if layer.routing.score == "sparsemixer":
        raise NoMatch("the router samples two experts one after the other")
    if layer.companions:
        raise NoMatch("another block takes the same choices")
    splice = Splice(program)
    fewer: dict[Value, Value] = {}
    for op in program.graph.ops:
        if op is not layer.route and not any(value in fewer for value in op.inputs):
            continue
        if op.name not in (*_CASTS, *_BLOCK):
            raise NoMatch(f"{op.name} reads the router's choices or weights")
        inputs = tuple(fewer.get(value, value) for value in op.inputs)
        attrs = {**op.attrs, "k": k} if "k" in op.attrs else op.attrs
        changed = replace(op, inputs=inputs, attrs=attrs)
        outputs = [
            value if value.type == type else Value(value.name, type)
            for value, type in zip(op.outputs, _types(changed), strict=True)
        ]
        fewer |= {old: new for old, new in zip(op.outputs, outputs, strict=True) if new is not old}
        if any(value in fewer for value in program.graph.results if value in op.outputs):
            raise NoMatch("the router's choices or weights are an output of the model")
        splice.put(op, [replace(changed, outputs=tuple(outputs))])
    return splice.done()


def _types(op: Op) -> tuple[TensorType, ...]:
    if op.name in _CASTS:
        return (TensorType(op.outputs[0].dtype, op.inputs[0].shape),)
    return OPS[op.name].infer(op)
