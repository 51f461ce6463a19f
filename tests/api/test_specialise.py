"""A module with a task as input, compiled for one task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.errors import UsageError
from moec.passes.specialise.specialise import Specialise
from moec.runtime.call.executor import load

D, H, E, TASKS = 8, 16, 4, 3


class Layer(nn.Module):
    """One gate for each task, or a choice by the task alone."""

    def __init__(self, by_task: bool) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.randn(TASKS, E, D))
        self.tasks = nn.Embedding(TASKS, E) if by_task else None
        self.w1, self.w2 = (nn.Parameter(torch.randn(E, *s) / 3) for s in ((H, D), (D, H)))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        if self.tasks is None:
            logits = F.linear(x, self.gates[task])
        else:
            logits = self.tasks(task).expand(x.shape[0], E)
        weights, ids = logits.softmax(-1).topk(1, -1)
        hidden = F.silu(torch.einsum("td,tkhd->tkh", x, self.w1[ids]))
        return x + (torch.einsum("tkh,tkdh->tkd", hidden, self.w2[ids]) * weights[..., None]).sum(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(False), Layer(True)])

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        t = x.reshape(-1, D)
        for layer in self.layers:
            t = layer(t, task)
        return t.reshape(x.shape)


x, task = torch.randn(2, 5, D), torch.tensor(2)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def compiled(model: Model) -> Any:
    return moec.compile(model, (x, task), passes=[Specialise({"task": 2})])


def test_the_input_is_gone_and_the_numbers_stay(compiled: Any, model: Model) -> None:
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x, task), rtol=1e-5, atol=1e-5)
    assert [port.name for port in compiled.package.main.inputs] == ["x"]
    assert [block.name for block in compiled.blocks] == ["layers.0"]


def test_the_report_says_what_was_saved(compiled: Any) -> None:
    report = str(compiled.report())
    saved = 4 * (3 * 2 * H * D + 2 * E * D + TASKS * E - 1)  # experts, gates, the table
    assert f"specialise: task=2: {saved:,} bytes of weights fewer" in " ".join(report.split())
    assert "layers.1: every token takes" in report
    assert compiled.report().verification[0].error < 1e-5


def test_the_artifact_holds_no_more_than_it_reads(compiled: Any, tmp_path: Path) -> None:
    path = tmp_path / "task.moec"
    compiled.save(path)
    np.testing.assert_allclose(load(path)({"x": x.numpy()})["output"], compiled(x), rtol=0)
    params = {port.name for port in compiled.package.main.params}
    assert set(compiled.package.arrays) == params


def test_as_text_and_without_building(model: Model) -> None:
    compiled_model = moec.compile(
        model, (x, task), passes="+specialise(task=0)", stop_after="specialise"
    )
    assert compiled_model.pass_results[-1].says[-1].startswith("task=0: ")


def test_without_verification(model: Model) -> None:
    compiled_model = moec.compile(
        model, (x, task), passes="+specialise(task=1)", build=False, verify=False
    )
    assert [v.name for v in compiled_model.graph.inputs] == ["x"]


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("+specialise(language=2)", "specialise: the model has no input language; it has x, task"),
        ("+specialise", "specialise: name an input of the model and its constant value"),
        ("-specialise", "specialise is off by default: leave it out"),
    ],
)
def test_mistakes(model: Model, passes: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        moec.compile(model, (x, task), passes=passes, build=False)


def test_no_data_is_needed_and_none_is_taken(model: Model) -> None:
    with pytest.raises(UsageError, match="calib is for passes that change the model"):
        moec.compile(model, (x, task), passes="+specialise(task=2)", calib={"x": x}, build=False)
