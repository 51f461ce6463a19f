"""Constant inputs: what Python computes of them is computed during the capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec
from moec.errors import UsageError
from moec.ir.interpret.evaluate import evaluate


class Split(nn.Module):
    """Sums runs of rows, whose lengths and weights it reads from its inputs."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        starts = torch.zeros(len(lengths), dtype=torch.int64)
        starts[1:] = lengths.cumsum(0)[:-1]
        filled = torch.tensor([0.0, 0.0])
        filled[:] = bias.sum()
        parts = torch.split(x, lengths.tolist(), dim=1)
        sums = torch.stack([part.sum(1) for part in parts], 1)
        return sums + starts.repeat_interleave(int(lengths.numel() // 2))[:, None] + filled[0]


def _example(batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return torch.randn(batch, 5, 4), torch.tensor([2, 3]), torch.randn(batch, 4)


def test_python_reads_a_constant_input() -> None:
    compiled = moec.compile(Split(), _example(3), constants="lengths", build=False)
    graph = compiled.pass_results[-1].program.graph
    assert [value.name for value in graph.inputs] == ["x", "bias"]
    assert "lengths is always [2, 3]" in compiled.report().notes
    for batch in (1, 3, 7):
        x, lengths, bias = _example(batch, seed=batch)
        (y,) = evaluate(graph, [x, bias], compiled.pass_results[-1].program.weights)
        torch.testing.assert_close(y, Split()(x, lengths, bias))


def test_names_are_checked() -> None:
    with pytest.raises(UsageError, match="constants names grid, but the inputs are x, lengths"):
        moec.compile(Split(), _example(3), constants="grid", build=False)
    with pytest.raises(UsageError, match="names every input; leave out those that vary"):
        moec.compile(Split(), _example(3), constants=["x", "lengths", "bias"], build=False)
    exported = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match="is a graph already: it has no constant inputs"):
        moec.compile(exported, constants="input", build=False)


def test_keywords_in_another_order_keep_their_names() -> None:
    x, lengths, bias = _example(3)
    keywords = {"bias": bias, "lengths": lengths, "x": x}
    compiled = moec.compile(Split(), (), keywords, constants="lengths", build=False)
    shapes = {value.name: len(value.shape) for value in compiled.captured.program.graph.inputs}
    assert shapes == {"x": 3, "bias": 2}
