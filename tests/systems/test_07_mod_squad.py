"""Mod-Squad: the model of one task has only that task's gate and the experts that it uses, and
gives the results of the whole model for the task."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

import moec
from docs.systems import COMPARABLE, Figure, Source
from moec import CompiledModel
from moec.passes.approximate.keep_used import KeepUsed
from moec.passes.specialise.specialise import Specialise
from tests.systems.records import Keep, load, record_of

example = load("07_mod_squad")
SOURCE = Source(
    number=7,
    title="Multi-task heterogeneous training (Mod-Squad)",
    paper="2306.17165",
    example="07_mod_squad",
    process="encoder",
    modalities=("image",),
    adds="`specialise` binds the task, which leaves one gate a layer; `keep-used` drops the "
    "experts that a table of usage says the task does not need. Heads that tokens choose are "
    "experts too: their queries are a block, and so are their output projections, with one gate.",
    trained="random images",
)
TOLERANCE = 1e-5  # float32, sums of at most 64 terms, through two blocks
TASK, UNUSED = 1, {"blocks.0.attention": 0, "blocks.1.mlp": 2}


@functools.cache
def model() -> nn.Module:
    """Task 1 never chooses one expert of each layer: its logit is -60 for any token."""
    torch.manual_seed(0)
    module, _ = example.small()
    norms = {"blocks.0.attention": "blocks.0.norm1", "blocks.1.mlp": "blocks.1.norm2"}
    with torch.no_grad():
        for name, expert in UNUSED.items():
            norm: Any = module.get_submodule(norms[name])
            norm.weight[0], norm.bias[0] = 0.0, 1.0  # one feature is always 1
            gate: Any = module.get_submodule(name).gate
            gate.weights[TASK, expert] = 0.0
            gate.weights[TASK, expert, 0] = -60.0
    return module


@functools.cache
def compiled() -> CompiledModel:
    _, inputs = example.small()
    usage = {name: [float(e != unused) for e in range(3)] for name, unused in UNUSED.items()}
    with TemporaryDirectory() as folder:
        table = Path(folder) / "usage.json"
        table.write_text(json.dumps(usage))
        passes = [Specialise({"task": TASK}), KeepUsed(usage=str(table))]
        return moec.compile(
            model(), inputs, passes=passes, calib={"images": torch.randn(16, 1, 8, 8)}, verify=False
        )


def test_a_task_has_one_gate_and_its_experts() -> None:
    blocks = [(b.experts, b.top_k, b.router) for b in compiled().blocks]
    assert blocks == [(2, 2, "softmax, top-2")] * 3  # queries, outputs of heads, and MLPs
    gates = [op for op in compiled().graph.ops if op.name in ("moe.gate", "moe.route")]
    assert len(gates) == example.SMALL.blocks
    assert [value.name for value in compiled().graph.inputs] == ["images"]
    width, tasks = example.SMALL.width, example.SMALL.tasks
    shapes = [param.shape for param in compiled().graph.params]
    assert (2, width) in shapes  # the task's gate, of the experts that are left
    assert not {(tasks, count, width) for count in (2, 3)} & set(shapes)


def test_outputs_equal_the_full_models() -> None:
    """The dropped experts are not among the best of any token of this task."""
    for count in (1, 5):
        images = torch.randn(count, 1, 8, 8)
        with torch.no_grad():
            expected = model()(images, torch.tensor(TASK))
            other = model()(images, torch.tensor(0))
        output = compiled()(images)
        torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert (output - other).abs().max() > 100 * TOLERANCE


def test_training_by_mutual_information_gives_tasks_their_own_experts() -> None:
    torch.manual_seed(0)
    module, (images, _) = example.small()
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    values = []
    for _ in range(30):
        loss = -example.mutual_information(module, images)
        values.append(-loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] > 2 * values[0]
    assert len(compiled().captured.program.graph.outputs) == 1


def test_the_published_size() -> None:
    """Gates and heads are of the 14 tasks of Taskonomy, 12 of which predict maps."""
    assert len(example.CLASSES) + len(example.MAPS) == example.Config.tasks
    for name, (_, millions) in example.PUBLISHED.items():
        assert example.published(name) / 1e6 == pytest.approx(millions, rel=0.01)


def test_record(keep: Keep) -> None:
    count = example.published("base")
    ours = f"{count / 1e6:.1f}M"
    figures = [Figure("parameters, base, 14 tasks", ours, "195.8M", COMPARABLE)]
    keep(record_of(compiled(), SOURCE, f"{TOLERANCE:g}", figures))
