"""Loops in which experts write rows back, in the forms of users' modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from tests.passes.forms import loops, rows
from tests.passes.forms.routers import switch
from tests.passes.forms.sizes import E
from tests.passes.recognise.test_recognise import check_text, recognised

Golden = Callable[[str], None]
FORMS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "added": (rows.Added, 2, "static loop"),
    "masked": (rows.Masked, 2, "static loop"),
    "slot-rows": (rows.SlotRows, 2, "static loop"),
    "written": (lambda: rows.Written(rule=switch), 1, "static loop"),
    "kept": (lambda: rows.Kept(rule=switch), 1, "static loop"),
    "counted": (rows.Counted, 2, "sort + grouped_mm"),
    "asked": (rows.Asked, 2, "static loop"),
    "places": (lambda: rows.Places(chunks=False), 1, "dense dispatch with capacity"),
    "chunks": (lambda: rows.Places(chunks=True), 1, "dense dispatch with capacity"),
}
LIMITED = ", at most 3 per expert, by slot"


@pytest.mark.parametrize("name", FORMS)
def test_rows(name: str, golden: Golden) -> None:
    make, slots, form = FORMS[name]
    program, (block,), declined = recognised(make())
    check_text(program, golden)
    assert (block.form, block.experts, block.top_k) == (form, E, slots)
    router = "softmax, top-2, renormalised" if slots == 2 else "softmax, top-1"
    assert block.router == router + (LIMITED if "capacity" in form else "")
    assert declined == ()


def test_a_sum_for_each_slot_is_a_block_for_each() -> None:
    _, blocks, _ = recognised(rows.SlotSums())
    assert [(block.form, block.experts, block.top_k) for block in blocks] == [
        ("static loop", E, 1)
    ] * 2


@pytest.mark.parametrize("module", [rows.Written, rows.OtherWeights])
def test_what_only_looks_so_is_refused(module: Callable[[], nn.Module]) -> None:
    """Two slots, of which one is written over or has other experts."""
    _, blocks, declined = recognised(module())
    assert blocks == ()
    assert "the numbers differ" in declined[0].reason


def test_a_table_names_the_expert() -> None:
    """As in hash layers, whose table is read at the ids of words."""
    _, (block,), _ = recognised(loops.Placed())
    assert (block.form, block.experts, block.top_k) == ("static loop", E, 1)
