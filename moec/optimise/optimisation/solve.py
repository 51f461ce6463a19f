"""The cheapest or the least damaging choice of a setting for each layer of experts and a format for
each product, solved as a mixed-integer linear program by HiGHS (scipy)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from moec.optimise.optimisation.expert_moves import Settings
from moec.optimise.optimisation.sensitivity import StoredProduct
from moec.passes.approximate.choices.model_choices import (
    LayerChoice,
    ProductChoice,
    formats_of,
    significant,
)
from moec.passes.quantise.mixed_experts import AnyFormat

SECONDS = 30.0
GAP = 1e-4
TINY = 1e-30  # less damage counts as none


@dataclass(frozen=True)
class SolvedChoice:
    """The option of each product and the setting of each layer, by name; their bytes, the bytes
    that a token reads of them, and the predicted damage."""

    options: Mapping[str, ProductChoice]
    settings: Mapping[str, LayerChoice]
    bytes: int
    token_bytes: int
    damage: float

    @property
    def formats(self) -> dict[str, AnyFormat]:
        return formats_of(self.options)

    @property
    def changed_layers(self) -> dict[str, LayerChoice]:
        return {name: setting for name, setting in self.settings.items() if setting.changes}


@dataclass(frozen=True)
class _Column:
    """A setting of a layer, or an option of a product or of `experts` of it (of all, where each has
    options), under a setting of the layer, if any."""

    name: str
    setting: LayerChoice | None
    option: ProductChoice | None
    bytes: float
    token_bytes: float
    damage: float
    experts: tuple[int, ...] = (0,)


def solve(
    products: Sequence[StoredProduct],
    layers: Settings,
    minimised: str,
    **limits: float | None,
) -> SolvedChoice | None:
    """The choice with the least of `minimised`, where each of `limits` is the greatest sum: of
    bytes, token_bytes and damage. None if nothing is within them."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    columns = _columns(products, layers)
    if not columns:
        return SolvedChoice({}, {}, 0, 0, 0.0)
    amounts = {
        name: np.array([getattr(column, name) for column in columns], float)
        for name in (minimised, *limits)
    }
    cost, possible = amounts[minimised], np.ones(len(columns), bool)
    constraints = [LinearConstraint(*_equalities(columns))]
    # HiGHS works to absolute tolerances, so that loads and costs are scaled to about 1.
    for name, limit in limits.items():
        if limit is not None:
            possible &= amounts[name] <= limit
            load = np.where(possible, amounts[name] / max(limit, 1e-300), 0)
            constraints.append(LinearConstraint(load[None], -np.inf, 1))
    best, ceiling = None, max(abs(cost).max(), TINY)
    while True:
        with silent_library():
            result = milp(
                np.minimum(cost, ceiling) / ceiling,
                integrality=np.ones(len(columns)),
                bounds=Bounds(0, (possible & (cost <= ceiling)).astype(float)),
                constraints=constraints,
                options={"time_limit": SECONDS, "mip_rel_gap": GAP},
            )
        if result.x is None:
            return best
        best = _choice([columns[n] for n in np.flatnonzero(result.x > 0.5)])
        total = float(getattr(best, minimised))
        if not TINY < total < ceiling / 10:
            return best
        ceiling = total  # what costs more is in no better choice


@contextmanager
def silent_library() -> Iterator[None]:
    """HiGHS prints a line on the stdout of the process where a solution that it had simplified has
    to be solved again; in the output of --json that is no JSON."""
    if sys.platform == "win32":  # where fflush has no name that all builds of Python share
        yield
        return
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    stdout = os.dup(1)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def _columns(products: Sequence[StoredProduct], layers: Settings) -> list[_Column]:
    columns = []
    for name, settings in layers.items():
        stored = sum(p.options[0].bytes_before for p in products if p.layer == name)
        for s in settings:
            # What a setting saves besides its products: columns of the router, biases.
            saved = s.bytes_saved - stored * (1 - len(s.experts) / s.of)
            columns.append(_Column(name, s, None, -saved, -saved, s.damage))
    for product in products:
        parts: list[tuple[LayerChoice | None, float, float]] = [(None, 1, 1)]
        if product.layer in layers:
            settings = layers[product.layer]
            parts = [(s, len(s.experts) / s.of, s.experts_read / s.of) for s in settings]
        every = tuple(range(len(product.experts))) or (0,)
        options = [(every, o) for o in product.options]
        options += [((e,), o) for e, single in enumerate(product.experts) for o in single]
        columns += [
            _Column(product.name, setting, o, o.bytes * stored, o.bytes * read, o.damage, experts)
            for setting, stored, read in parts
            for experts, o in options
        ]
    return columns


def _equalities(columns: Sequence[_Column]) -> tuple[Any, list[float], list[float]]:
    """One setting of each layer; one option of each product or expert, under that of its layer."""
    from scipy.sparse import csr_array

    settings = {id(c.setting): i for i, c in enumerate(columns) if c.option is None}
    rows: dict[tuple[str, bool, int, int], int] = {}
    entries: list[tuple[int, int, float]] = []
    sums: list[float] = []
    for i, column in enumerate(columns):
        under = column.option is not None and column.setting is not None
        for e in column.experts:
            key = (column.name, column.option is None, e, id(column.setting) if under else 0)
            if key not in rows:
                rows[key] = len(rows)
                sums.append(0.0 if under else 1.0)
                entries += [(rows[key], settings[id(column.setting)], -1.0)] if under else []
            entries.append((rows[key], i, 1.0))
    row, at, values = zip(*entries, strict=True)
    return csr_array((values, (row, at)), shape=(len(rows), len(columns))), sums, sums


def _choice(chosen: Sequence[_Column]) -> SolvedChoice:
    options: dict[str, dict[int, ProductChoice]] = {}
    for column in (column for column in chosen if column.option):
        assert column.option is not None
        options.setdefault(column.name, {})[column.experts[0]] = column.option
    return SolvedChoice(
        {name: _joined(each) for name, each in options.items()},
        {column.name: column.setting for column in chosen if column.setting and not column.option},
        round(sum(column.bytes for column in chosen)),
        round(sum(column.token_bytes for column in chosen)),
        sum(column.damage for column in chosen),
    )


def _joined(options: Mapping[int, ProductChoice]) -> ProductChoice:
    """The choice of a product from those of its experts: the format of most, and the others."""
    experts: dict[str, list[int]] = {}
    for e, option in sorted(options.items()):
        experts.setdefault(option.format, []).append(e)
    most, *others = sorted(experts, key=lambda format: -len(experts[format]))
    return msgspec.structs.replace(
        options[experts[most][0]],
        bytes=sum(option.bytes for option in options.values()),
        bytes_before=sum(option.bytes_before for option in options.values()),
        damage=significant(sum(option.damage for option in options.values())),
        experts={format: tuple(experts[format]) for format in others},
    )
