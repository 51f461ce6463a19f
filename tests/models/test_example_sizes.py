"""A family captured from one token gives the graph of two texts of sixteen tokens; test_families.py
compares that of one text."""

from __future__ import annotations

import pytest

from moec.capture import capture
from moec.ir.text import print_graph
from tests.models.captured import captured_program
from tests.models.families import SMALL
from tests.once import Once


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_for_every_size_of_the_example(name: str, once: Once) -> None:
    first = print_graph(captured_program(name, once).graph)
    family = SMALL[name]
    model = family.build()
    captured = capture(model, (), family.inputs(1, 1))
    assert print_graph(captured.program.graph) == first
    assert [note for note in captured.fixed if "drawn masks" not in note] == []
