"""Ids of experts that come from outside: where eager counts from the end, so does the block, where
eager raises, it refuses, and where a mask matches no expert, none is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.errors import InputError
from moec.ir.interpret.evaluate import evaluate

EXPERTS, D, H = 4, 8, 16


class Experts(nn.Module):
    """x [T, D], ids [T] -> [T, D]."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.up = nn.Parameter(torch.randn(EXPERTS, D, H) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, H, D) * 0.3)
        self.gates = nn.Parameter(torch.randn(EXPERTS, D, EXPERTS))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(EXPERTS))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.function(self, x, ids)


def products(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x[:, None], up).relu(), down)[:, 0]


def indexed(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return products(x, m.up[ids], m.down[ids])


def selected(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return products(x, m.up.index_select(0, ids), m.down[ids])


def embedded(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    up = F.embedding(ids, m.up.flatten(1)).view(-1, D, H)
    return products(x, up, F.embedding(ids, m.down.flatten(1)).view(-1, H, D))


def shifted(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return indexed(m, x, ids - 1)


def adapters(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + torch.bmm(torch.bmm(x[:, None], m.up[ids]), m.down[ids])[:, 0]


def gates_of_tasks(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    gate = torch.bmm(x[:, None], m.gates[ids])[:, 0].softmax(-1)
    return (gate[..., None] * torch.stack([e(x) for e in m.experts], 1)).sum(1)


def sorted_rows(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    order = ids.argsort(stable=True)
    y = indexed(m, x[order], ids[order])
    return torch.empty_like(y).index_copy(0, order, y)


def in_a_loop(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows = torch.where(ids == number)[0]
        y = y.index_add(0, rows, expert(x[rows]))
    return y


def masked(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return sum((ids == e)[:, None] * expert(x) for e, expert in enumerate(m.experts))


FORMS = (
    *(indexed, selected, embedded, shifted, adapters),
    *(gates_of_tasks, sorted_rows, in_a_loop, masked),
)


def outcome(function: Callable[..., Any], *inputs: Tensor) -> Tensor | None:
    """The result; None where the inputs are refused."""
    try:
        with torch.no_grad():
            return function(*inputs)
    except (RuntimeError, IndexError, InputError):
        return None
    except Exception as why:
        if type(why).__module__.startswith("onnxruntime"):
            return None
        raise


IDS = ((0, 1, 2), (-1, 0, -2), (-4, 3, 0), (0, 4, 1), (-5, 0, 0), (2**40, 1, 1))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_as_eager(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Experts(form).eval(), torch.randn(3, D)
    model = moec.compile(module, (x, torch.tensor(IDS[0])), verify=False)
    assert len(model.blocks) == 1
    model.export_onnx(tmp_path / "m.onnx", ep="cpu")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [value.name for value in session.get_inputs()]

    def by_onnx(*inputs: Tensor) -> Tensor:
        feeds = dict(zip(names, (t.numpy() for t in inputs), strict=True))
        return torch.from_numpy(session.run(None, feeds)[0])

    torch._dynamo.reset()
    doors = {"compile": model, "backend": torch.compile(module, backend="moec"), "onnx": by_onnx}
    for ids in map(torch.tensor, IDS):
        expected = outcome(module, x, ids)
        for name, door in doors.items():
            actual = outcome(door, x, ids)
            where = f"{name} of {ids.tolist()}"
            assert (actual is None) == (expected is None), where
            if expected is not None:
                torch.testing.assert_close(actual, expected, msg=lambda m, w=where: f"{w}: {m}")


def test_the_refusal_names_the_input() -> None:
    module, x = Experts(indexed).eval(), torch.randn(3, D)
    model = moec.compile(module, (x, torch.tensor([0, 1, 2])), verify=False)
    with pytest.raises(InputError, match="input 'ids' holds 4 at"):
        model(x, torch.tensor([0, 4, 1]))
    shifts = moec.compile(Experts(shifted).eval(), (x, torch.tensor([0, 1, 2])), verify=False)
    with pytest.raises(InputError, match="the choice of one of 4 experts has the index 4"):
        shifts(x, torch.tensor([0, 5, 1]))


def test_the_graph_refuses_too() -> None:
    """Not only kernels: the graph means what eager means."""
    module, x = Experts(indexed).eval(), torch.randn(2, D)
    model = moec.compile(
        module, (x, torch.tensor([0, 1])), verify=False, stop_after="recognise-routers"
    )
    program = model.pass_results[-1].program
    with pytest.raises(IndexError, match="indices must be from -4 to 3"):
        evaluate(program.graph, [x, torch.tensor([0, -5])], program.weights)
