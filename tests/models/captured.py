"""The captured program of each small family, for all tests that change it or read it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from moec.capture import capture
from moec.ir.graph import Program
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.interpret.outputs import flatten
from moec.ir.text import parse, print_graph
from tests.models.families import SMALL
from tests.once import Once

GRAPH, WEIGHTS = "graph.moec", "weights.pt"


def fill(name: str, folder: Path) -> None:
    family = SMALL[name]
    program = capture(family.build(), (), family.inputs(2, 16)).program
    (folder / GRAPH).write_text(print_graph(program.graph), encoding="utf-8")
    torch.save(dict(program.weights), folder / WEIGHTS)


def captured_program(name: str, once: Once) -> Program:
    """A family in float32, from two texts of sixteen tokens."""
    folder = once(f"family-{name}", partial(fill, name))
    graph = parse((folder / GRAPH).read_text(encoding="utf-8"))
    return Program(graph, torch.load(folder / WEIGHTS))


def captured_module(name: str, once: Once) -> GraphModule:
    """As `captured_program`, as a module that `moec.compile` takes without tracing it."""
    inputs = SMALL[name].inputs(2, 16).values()
    example = tuple(value for value in inputs if isinstance(value, torch.Tensor))
    _, structure = flatten(torch.zeros(0))
    return GraphModule(captured_program(name, once), {}, (example, {}), structure)
