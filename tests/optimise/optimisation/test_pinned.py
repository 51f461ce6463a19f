"""Formats that the user chooses; the others are chosen beside them."""

from __future__ import annotations

import re
from typing import Any

import pytest

import moec
from moec.errors import UsageError
from moec.optimise.optimisation import sensitivity
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.optimise.optimisation.pinned import parse_pinned, pinned_for, split_pinned
from tests.optimise.optimisation.test_moves import STACK, X, formats_of, net


def formats(pin: dict[str, str], memory: int, **options: Any) -> dict[str, str]:
    searched = search(
        net(), (X[:5],), calib={"x": X}, formats=("int8", "int4:32"), pin=pin, **options
    )
    return formats_of(searched.choices(choice_limits(memory, None, None)))


def test_what_is_pinned_is_not_chosen() -> None:
    """The second layer counts more: without a pin, the first one has fewer bits."""
    room = STACK
    assert formats({}, room) != (reverse := formats({"second": "int4:32"}, room))
    assert reverse["second"] == "int4:32"
    assert reverse["first"] == "unchanged" or "int8"
    pinned = formats({"*": "int4:32", "first": "unchanged"}, 2 * STACK)
    assert (pinned["first"], pinned["second"]) == ("unchanged", "int4:32")
    both = formats({"second": "int4:32"}, 3 * STACK)  # room for all weights as they are
    assert both == {"first": "unchanged", "second": "int4:32"}


def test_rows_are_not_read_for_products_that_keep_their_weights(monkeypatch: Any) -> None:
    read: list[int] = []
    row_gradients = sensitivity.row_gradients

    def watched(program: Any, evaluator: Any, products: Any, samples: int) -> Any:
        read.append(len(products))
        return row_gradients(program, evaluator, products, samples)

    monkeypatch.setattr(sensitivity, "row_gradients", watched)
    for pin in ({}, {"first": "unchanged"}, {"*": "unchanged"}):
        search(net(), (X[:5],), calib={"x": X}, formats=("int8",), pin=pin)
    assert read == [2, 1, 0]


def test_the_compiled_model_has_the_pinned_formats() -> None:
    model = moec.optimize(
        net(), (X[:5],), calib={"x": X}, memory=2 * STACK, pin={"first": "int8"}, build=False
    )
    counts = {op.name for op in model.graph.ops}
    assert any(name.startswith("grouped.quantised") for name in counts), counts


@pytest.mark.parametrize(
    ("pin", "words"),
    [
        ({"third": "int8"}, "no product is named 'third': products are second, first"),
        ({"first": "int7"}, "int7"),
        ({"first": "int4:128"}, "first cannot be int4:128: "),
        ({"*": "unchanged"}, "the weights take"),
    ],
)
def test_what_cannot_be_pinned(pin: dict[str, str], words: str) -> None:
    with pytest.raises((UsageError, ValueError), match=re.escape(words)):
        formats(pin, STACK // 2)


@pytest.mark.parametrize("text", ["first", "=int8", "first="])
def test_what_is_no_pin(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--pin {text}: write PATTERN=FORMAT")):
        split_pinned([text])


def test_the_last_pattern_counts() -> None:
    pinned = parse_pinned(split_pinned(["*=int8", "layers.[0-9].mlp=unchanged"]))
    pin = pinned_for("layers.3.mlp", pinned)
    assert pin is not None
    assert pin.format is None
    assert str((pinned_for("head", pinned) or pin).format) == "int8"
    assert pinned_for("head", ()) is None
