"""Leaves each layer the experts and the top-k that a file of choices has for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Program, Stage
from moec.passes.approximate.choices.model_choices import (
    LayerChoice,
    ModelChoices,
    choice_lines,
    describe_choices,
    formats_of,
)
from moec.passes.approximate.merge_experts import merge_groups
from moec.passes.approximate.prune_experts import drop_experts, shortage
from moec.passes.approximate.reduce_top_k import reduce_top_k
from moec.passes.approximate.skip_small_weights import skip_small_weights
from moec.passes.approximate.training.recover_routers import RecoverRouters
from moec.passes.calibration.session import CalibrationSession, layers_of
from moec.passes.core.moe_layer import Layer
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
        for name, choice in self.choices.layers.items():
            try:
                _check(choice, changeable_layers(program, Log()).get(name))
                changed = change_experts(program, name, choice)
            except NoMatch as why:
                log.decline("choices", f"{name}: {why}")
                return program
            if log.spend(f"{name}: {len(choice.experts)} experts, top {choice.top_k}"):
                program = changed
        log.says += describe_choices(self.choices)
        log.choices += choice_lines(self.choices)
        return program


def passes_of(choices: ModelChoices) -> list[OptInPass]:
    """The passes that apply the choices. Raises UsageError for a format that does not exist, and
    for formats of single experts beside dropped ones."""
    dropping = any(len(choice.experts) < choice.of for choice in choices.layers.values())
    if dropping and any(choice.experts for choice in choices.products.values()):
        raise UsageError(
            "choices: experts have formats by number, and a layer drops or merges some, which "
            "changes the numbers: leave out one of both"
        )
    shapes = {name: (choice.rows, choice.columns) for name, choice in choices.products.items()}
    formats = FixedFormats(formats_of(choices.products), shapes, choices.codes == "gptq")
    recovery = [RecoverRouters(choices.recover)] if choices.recover else []
    return [ChooseExperts(choices), *([formats] if formats.formats else []), *recovery]


def check_applied(pass_results: Sequence[PassResult]) -> None:
    """Raises UsageError where choices were not those of the model."""
    for declined in (declined for result in pass_results for declined in result.declined):
        if declined.where == "choices":
            raise UsageError(
                f"choices: {declined.reason}: give those that moec optimize wrote for this model"
            )


def changeable_layers(program: Program, log: Log) -> dict[str, Layer]:
    """The blocks whose experts and top-k can be changed, by the names that no two of them share."""
    layers = layers_of(program, log)
    counts = Counter(layer.name for layer in layers)
    return {layer.name: layer for layer in layers if counts[layer.name] == 1}


def change_experts(program: Program, name: str, choice: LayerChoice) -> Program:
    """The program in which a layer has the experts and the top-k of a choice, and a token skips
    those that it says. Raises NoMatch."""
    layer = changeable_layers(program, Log())[name]
    if choice.merged:
        program = merge_groups(program, layer, choice.merged, choice.usage)
    elif len(choice.experts) < layer.count:
        program = drop_experts(program, layer, choice.experts).program
    if choice.top_k < layer.routing.k:
        program = reduce_top_k(program, changeable_layers(program, Log())[name], choice.top_k)
    if not choice.threshold:
        return program
    return skip_small_weights(program, changeable_layers(program, Log())[name], choice.threshold)


def _check(choice: LayerChoice, layer: Layer | None) -> None:
    """Raises NoMatch where the layer is not that of the choice, or cannot route so."""
    if layer is None:
        raise NoMatch("the model has no such layer")
    k, groups = layer.routing.k, layer.routing.groups
    if (choice.of, choice.top_k_before) != (layer.count, k):
        raise NoMatch(f"the model has {layer.count} experts there, {k} for each token")
    each, rest = divmod(len(choice.experts), groups)
    ordered = choice.experts == tuple(sorted(set(choice.experts) & set(range(layer.count))))
    if choice.merged or choice.usage:
        members = sorted(e for group in choice.merged for e in group)
        firsts = tuple(group[0] for group in choice.merged if group)
        every, counts = list(range(layer.count)), len(choice.usage)
        if (members, firsts, counts) != (every, choice.experts, layer.count):
            raise NoMatch(
                f"merged and usage are those of {layer.count} experts, each in one group, of which "
                "experts has the first"
            )
    if not ordered or rest or shortage(layer, each) or not 1 <= choice.top_k <= k:
        raise NoMatch(f"no router of top {k} chooses {choice.top_k} of experts {choice.experts}")
