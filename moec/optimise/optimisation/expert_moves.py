"""What fewer experts and a smaller top-k cost a layer in quality, measured on data.

The experts that are left are those with the greatest contributions: the router's weight times the
norm of the expert's result, summed over the tokens that chose it; or each is merged from those with
similar results; or those give constants whose results differ least from them. A shared expert is
dropped, or gives its mean. Each setting is measured alone: the damage to the whole model with that
layer changed and all else as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product

import torch
from msgspec.structs import replace

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.stats import stored_bytes
from moec.optimise.optimisation.sensitivity import damage_of
from moec.passes.approximate.choices.changeable import (
    NO_CONSTANTS,
    Constants,
    shared_means,
)
from moec.passes.approximate.choices.choose_experts import change_experts
from moec.passes.approximate.choices.constant_experts import ExpertConstants, expert_constants
from moec.passes.approximate.choices.drop_shared import SharedExpert
from moec.passes.approximate.choices.model_choices import LayerChoice, significant
from moec.passes.approximate.insert_zero_experts import check_combinable
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import best_experts, shortage
from moec.passes.approximate.skip_small_weights import check_skippable
from moec.passes.calibration.evaluator import Evaluator, LayerStats
from moec.passes.core.moe_layer import Layer
from moec.passes.core.runner import Log

PRUNE, MERGE, TOP_K, THRESHOLD = "prune", "merge", "top-k", "threshold"
CONSTANT, SHARED = "constant", "shared"
STRENGTHS = (3 / 4, 1 / 2)
"""The parts of a layer's experts, and of its top-k, that may be left."""


Settings = dict[str, tuple[LayerChoice, ...]]
"""The settings of layers, and of shared experts, by name; the first is as it is."""


def measure_layers(
    program: Program,
    evaluator: Evaluator,
    layers: Mapping[str, Layer],
    moves: Collection[str],
    log: Log,
) -> tuple[Settings, Constants]:
    """Experts, top-k, and both, whose damages are added; and the constants that settings have in
    place of experts."""
    options: Settings = {name: (_unchanged(layer),) for name, layer in layers.items()}
    constants: dict[str, torch.Tensor] = {}
    if not {PRUNE, MERGE, CONSTANT, TOP_K, THRESHOLD} & set(moves):
        return options, constants
    each = evaluator.layer_stats(program, list(layers.values()))
    for (name, layer), stats in zip(layers.items(), each, strict=True):
        first, worth = options[name][0], stats.saliency(layer.count) * stats.usage(layer.count)
        counts = sorted({max(1, int(part * first.top_k)) for part in STRENGTHS} - {first.top_k})
        sets = list(_prunings(layer, worth) if PRUNE in moves else ())
        sets += _mergings(program, layer, stats, log) if MERGE in moves else ()
        if CONSTANT in moves and (of := _constants(program, layer, stats, log)):
            constants[name] = of.vectors
            sets += _replacements(layer, of, worth)
        fewer = [replace(first, top_k=k) for k in (counts if TOP_K in moves else ())]
        fewer += _skippings(layer, stats, log) if THRESHOLD in moves else ()
        pruned, limited = (
            [first, *_measured(program, evaluator, name, settings, log, constants)]
            for settings in (sets, fewer)
        )
        options[name] = tuple(_combined(a, b, stats) for a, b in product(pruned, limited))
    return options, constants


def measure_shared(
    program: Program, evaluator: Evaluator, shared: Mapping[str, SharedExpert], log: Log
) -> tuple[Settings, Constants]:
    """Without each shared expert: the better of its mean, a constant, and nothing."""
    options: Settings = {}
    means = shared_means(program, evaluator, shared)
    for name in shared:
        without = LayerChoice((), 1, 0, 1)
        both = [without, replace(without, constant=True)]
        measured = list(_measured(program, evaluator, name, both, log, means))
        best = min(measured, key=lambda choice: choice.damage)
        options[name] = (LayerChoice((0,), 1, 1, 1), best)
    return options, means


def _combined(experts: LayerChoice, fewer: LayerChoice, stats: LayerStats) -> LayerChoice:
    """The experts of one choice, and of the other how many of them a token takes."""
    damage = significant(experts.damage + fewer.damage)
    k, threshold, mean_k = fewer.top_k, fewer.threshold, fewer.mean_k
    both = replace(experts, top_k=k, threshold=threshold, mean_k=mean_k, damage=damage)
    return replace(both, mean_k=_mean_k(both, stats)) if experts.constant else both


def _mean_k(choice: LayerChoice, stats: LayerStats) -> float:
    """How many of the experts that are left a token reads, on average."""
    left = torch.zeros(choice.of + 1, dtype=torch.bool)
    left[list(choice.experts)] = True
    read = left[stats.experts.clamp(max=choice.of)]
    if choice.threshold:
        read &= _ratios(stats) >= choice.threshold
    return significant(float(read[:, : choice.top_k].float().sum(-1).mean()))


def _ratios(stats: LayerStats) -> torch.Tensor:
    """Each weight of a token's experts, relative to its greatest: f32[T, k]."""
    return stats.weights / stats.weights.amax(-1, keepdim=True)


def _unchanged(layer: Layer) -> LayerChoice:
    k = layer.routing.k
    return LayerChoice(tuple(range(layer.count)), layer.count, k, k)


def _prunings(layer: Layer, worth: torch.Tensor) -> Iterator[LayerChoice]:
    """Smaller sets of experts: without those that contribute nothing, and of each of STRENGTHS;
    equally many of each group."""
    groups = layer.routing.groups
    used = int((worth.reshape(groups, -1) > 0).sum(1).max())
    size = layer.count // groups
    for each in sorted({used, *(int(part * size) for part in STRENGTHS)}, reverse=True):
        if 0 < each < size and not shortage(layer, each):
            experts = best_experts(layer, worth, each)
            share = 1 - float(worth[experts].sum() / worth.sum().clamp(min=1e-30))
            yield replace(
                _unchanged(layer), experts=tuple(experts), share=significant(max(share, 0.0))
            )


def _constants(
    program: Program, layer: Layer, stats: LayerStats, log: Log
) -> ExpertConstants | None:
    try:
        check_combinable(layer)
        return expert_constants(program, layer, stats, range(layer.count))
    except NoMatch as why:
        log.decline(layer.name, str(why))
        return None


def _replacements(
    layer: Layer, constants: ExpertConstants, worth: torch.Tensor
) -> Iterator[LayerChoice]:
    """Each of STRENGTHS of the experts; those give constants whose errors are smallest."""
    order = torch.sort(constants.errors, descending=True, stable=True).indices.tolist()
    for each in sorted({int(part * layer.count) for part in STRENGTHS}, reverse=True):
        if 0 < each < layer.count:
            share = float(worth[order[each:]].sum() / worth.sum().clamp(min=1e-30))
            experts = tuple(sorted(order[:each]))
            yield replace(
                _unchanged(layer), experts=experts, constant=True, share=significant(share)
            )


def _mergings(program: Program, layer: Layer, stats: LayerStats, log: Log) -> Iterator[LayerChoice]:
    """Each of STRENGTHS of the experts, merged from those whose results are similar."""
    usage = tuple(stats.usage(layer.count).tolist())
    for each in sorted({int(part * layer.count) for part in STRENGTHS}, reverse=True):
        if not layer.routing.k <= each < layer.count:
            continue
        try:
            groups = MergeExperts(each / layer.count).groups(program, layer, stats)
        except NoMatch as why:
            log.decline(layer.name, str(why))
            continue
        firsts = tuple(group[0] for group in groups)
        yield replace(_unchanged(layer), experts=firsts, merged=groups, usage=usage)


def _skippings(layer: Layer, stats: LayerStats, log: Log) -> Iterator[LayerChoice]:
    """The thresholds that leave a token each of STRENGTHS of its experts, on average."""
    try:
        check_skippable(layer)
    except NoMatch as why:
        log.decline(layer.name, str(why))
        return
    ratios = _ratios(stats)
    ordered, k = ratios.flatten().sort().values, layer.routing.k
    for part in STRENGTHS:
        least = significant(float(ordered[round((1 - part) * (len(ordered) - 1))]))
        mean_k = significant(float((ratios >= least).float().sum(-1).mean()))
        if 0 < least < 1 and mean_k < k:
            yield replace(_unchanged(layer), threshold=least, mean_k=mean_k)


def _measured(
    program: Program,
    evaluator: Evaluator,
    name: str,
    settings: Iterable[LayerChoice],
    log: Log,
    constants: Constants = NO_CONSTANTS,
) -> Iterator[LayerChoice]:
    for setting in settings:
        try:
            changed = change_experts(program, name, setting, constants)
        except NoMatch as why:
            log.decline(name, str(why))
            continue
        saved = stored_bytes(program) - stored_bytes(changed)
        damage = significant(damage_of(evaluator.measure(changed)[0]))
        yield replace(setting, bytes_saved=saved, damage=damage)
