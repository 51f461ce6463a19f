"""What choices can change in a program, by name: blocks of experts, and their shared experts; and
the constants that choices have in place of experts, which are means of results on data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import torch

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.passes.approximate.choices.constant_experts import expert_constants
from moec.passes.approximate.choices.drop_shared import SHARED, SharedExpert, shared_expert_of
from moec.passes.approximate.choices.model_choices import LayerChoice
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import layers_of
from moec.passes.core.moe_layer import Layer
from moec.passes.core.runner import Log

Constants = Mapping[str, torch.Tensor]
"""By the name of a layer the constant of each expert [E, D], of a shared expert its mean [D]."""
NO_CONSTANTS: Constants = MappingProxyType({})


def changeable_layers(program: Program, log: Log) -> dict[str, Layer]:
    """The blocks whose experts and top-k can be changed, by the names that no two of them share."""
    layers = layers_of(program, log)
    counts = Counter(layer.name for layer in layers)
    return {layer.name: layer for layer in layers if counts[layer.name] == 1}


def shared_expert(program: Program, name: str) -> SharedExpert:
    """The shared expert of this name. Raises NoMatch."""
    layer = changeable_layers(program, Log()).get(name.removesuffix(SHARED))
    if layer is None or not name.endswith(SHARED):
        raise NoMatch("the model has no such layer")
    return shared_expert_of(program, layer)


def shared_experts(
    program: Program, layers: Mapping[str, Layer], log: Log
) -> dict[str, SharedExpert]:
    """Those that can be dropped, by name."""
    shared = {}
    for layer in layers.values():
        try:
            one = shared_expert_of(program, layer)
        except NoMatch as why:
            log.decline(layer.name, str(why))
            continue
        shared[one.name] = one
    return shared


def shared_means(
    program: Program, evaluator: Evaluator, shared: Mapping[str, SharedExpert]
) -> Constants:
    """The mean of each shared expert's results over the tokens of the data: f64[D]."""
    if not shared:
        return NO_CONSTANTS
    sums, rows = [torch.zeros(())] * len(shared), 0
    for results in evaluator.run(program, [one.result for one in shared.values()]):
        parts = [part.flatten(0, -2).double() for part in results[len(evaluator.outputs) :]]
        sums = [total + part.sum(0) for total, part in zip(sums, parts, strict=True)]
        rows += len(parts[0])
    return {name: total / max(rows, 1) for name, total in zip(shared, sums, strict=True)}


def constants_of(
    program: Program, evaluator: Evaluator, choices: Mapping[str, LayerChoice]
) -> Constants:
    """The constants of `choices`, which are of this program, on the data of `evaluator`."""
    chosen = {name: choice for name, choice in choices.items() if choice.constant}
    every = changeable_layers(program, Log())
    layers = {name: every[name] for name in chosen if name in every}
    shared = {name: shared_expert(program, name) for name in chosen if name not in every}
    constants = dict(shared_means(program, evaluator, shared))
    each = evaluator.layer_stats(program, list(layers.values()))
    for (name, layer), stats in zip(layers.items(), each, strict=True):
        others = set(range(layer.count)) - set(chosen[name].experts)
        constants[name] = expert_constants(program, layer, stats, others).vectors
    return constants
