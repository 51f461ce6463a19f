"""Experts without a network in a loop over experts (zero-computation experts, arXiv 2410.07348).

    out = out + share_e * x                                                   a copy
    out = out + share_e * (a * x + b * v),  a, b = softmax(linear(x, w[2, D]))    a constant

    out = out + share_e * 0                                                   a zero

The same forms occur over only the rows that chose the expert. A zero expert may also be missing
from the graph: then the router chooses among more experts than the loop has links. The role of a
weight follows from its shape; the proof checks the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.passes.recognise.forms.branches.unrolled_experts import (
    Branch,
    cone,
    first_product,
    named_by,
    number_of,
    read_branch,
    selected_by,
    stack_recipes,
)
from moec.passes.recognise.reading.block import Zero
from moec.passes.recognise.reading.opnames import ADDS, ZEROS
from moec.passes.recognise.region import Recipe, Scope, chooses


def chosen(scope: Scope, op: Op, added: Value) -> bool:
    """Whether the added value is weighted by a choice."""
    weighted = scope.made_by(scope.behind_casts(added), "aten.mul.Tensor")
    if weighted is None:
        return False
    if op.name in ADDS and copied(scope, added):
        return True
    return any(v.shape[-1:] == (1,) and chooses(scope, v) for v in weighted.inputs)


def copied(scope: Scope, added: Value) -> bool:
    """Whether gathered rows are added back unchanged, except for a weight."""
    value = scope.behind_casts(added)
    weighted = scope.made_by(value, "aten.mul.Tensor")
    assert weighted is not None
    picked = [scope.made_by(scope.behind_casts(v), "aten.index.Tensor") for v in weighted.inputs]
    return any(rows is not None and rows.outputs[0].shape == value.shape for rows in picked)


def adds_zeros(scope: Scope, added: Value) -> bool:
    """Whether the added value is a weight times zeros."""
    weighted = scope.made_by(scope.behind_casts(added), "aten.mul.Tensor")
    makers = () if weighted is None else [scope.made_by(v, *ZEROS) for v in weighted.inputs]
    return any(m is not None and m.attrs.get("fill_value", 0) in (0, 0.0) for m in makers)


def zero_experts(scope: Scope, links: Sequence[tuple[Op, Value]], first: int, x: Value) -> Zero:
    """The experts without a network, with ids from `first` on, read from the chain's last links.

    Raises NoMatch if an id belongs to an expert with a network, or if the shapes of the weights do
    not show their roles.
    """
    kinds: dict[int, str] = {}
    constants: dict[int, Branch] = {}
    for position, (op, value) in enumerate(links, first):
        ops = cone(scope, value)
        naming = [named_by(scope, selects) for _, selects in selected_by(op)]
        named = [number_of(scope, [maker]) for maker in naming if maker is not None]
        numbers = (n for n in (*named, number_of(scope, ops)) if n is not None)
        number = next(numbers, position)
        if number < first or number in kinds:
            raise NoMatch(f"{value.name} belongs to expert {number}, which has a network")
        if any(first_product(scope, op) for op in ops):
            kinds[number] = "constant"
            constants[number] = read_branch(scope, value, ops)
        else:
            kinds[number] = "zero" if adds_zeros(scope, value) else "copy"
    every = tuple(kinds.get(number, "zero") for number in range(first, max(kinds) + 1))
    if not constants:
        return Zero(every)
    try:
        weights = _weights(scope, [constants[number] for number in sorted(constants)], x)
    except NoMatch as why:
        reason = (
            f"only {first} of the {first + len(links)} experts that the router chooses among are "
            "alike"
        )
        raise NoMatch(f"{reason}: {why}") from None
    return Zero(every, *weights)


def _weights(scope: Scope, branches: Sequence[Branch], x: Value) -> tuple[Recipe, Recipe]:
    weights: dict[str, Recipe] = {}
    width = x.shape[-1]
    roles = {(2, width): "mix", (width,): "values", (1, width): "values"}
    for param, recipe in zip(branches[0].body.params, stack_recipes(scope, branches), strict=True):
        weights[roles.get(param.shape, param.name)] = recipe
    if set(weights) != {"mix", "values"}:
        shapes = ", ".join(str(param.type) for param in branches[0].body.params)
        raise NoMatch(f"a constant has weights [2, D] and [D], an expert of its kind {shapes}")
    return weights["mix"], weights["values"]
