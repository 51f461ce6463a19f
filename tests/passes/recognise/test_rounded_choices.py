"""Routers of models in 16 bits choose by scores that eager rounded: many tie, and the first of
equals is chosen. After every pass the choices are those of eager under stable sorts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.graph import Op
from moec.ir.interpret.evaluate import evaluate, run_graph
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.model.compiled import CompiledModel
from moec.oracle.tolerance import distance

WIDTH, EXPERTS, K = 16, 8, 3
Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K)
    return weights, ids


def softmax_twice(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K)
    return weights.softmax(-1), ids


def renormalised(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K)
    return weights / weights.sum(-1, keepdim=True) * 2.5, ids


def sigmoid(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.sigmoid().topk(K)
    return weights / weights.sum(-1, keepdim=True), ids


def biased(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = (scores + bias).topk(K)[1]
    return scores.gather(1, ids), ids


def biased_in_float32(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = (scores.float() + bias.float()).topk(K)[1]
    return scores.gather(1, ids), ids


def grouped(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    choice = scores + bias
    best = choice.view(-1, 4, EXPERTS // 4).topk(2)[0].sum(-1).topk(2)[1]
    mask = torch.zeros(choice.shape[0], 4, dtype=torch.bool).scatter(1, best, True)
    mask = mask.unsqueeze(-1).expand(-1, 4, EXPERTS // 4).reshape(-1, EXPERTS)
    ids = choice.masked_fill(~mask, -torch.inf).topk(K)[1]
    return scores.gather(1, ids), ids


def narrowed(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).to(logits.dtype).topk(K)
    return weights, ids


def in_float32(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(K)
    return weights, ids


def after(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.topk(K)
    return weights.softmax(-1), ids


def chosen_across(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """No value [T, E] holds the scores after they were rounded."""
    scores = logits.sigmoid()
    ids = (scores * 0.3).t().topk(K, 0)[1].t()
    return scores.gather(1, ids), ids


class Layer(nn.Module):
    def __init__(self, router: Router, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = router
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.bias = nn.Parameter(torch.randn(EXPERTS) * 0.1)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(self.gate(x), self.bias)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == i)
            y = y.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None].to(x.dtype))
        return y


def choices(compiled: CompiledModel, x: Tensor) -> Iterator[tuple[Op, Tensor]]:
    """The router after each pass that has one, and its sorted ids."""
    for result in compiled.pass_results:
        graph, weights = result.program.graph, result.program.weights
        for op in graph.ops:
            if op.name in ("moe.route", "moe.gate"):
                cut = replace(graph, outputs=(op.outputs[1],))
                tensors = [x, *(weights[param.name] for param in graph.params)]
                yield op, run_graph(cut, tensors)[0].sort(-1).values


HALF, BRAIN = torch.float16, torch.bfloat16
ORDERS: list[tuple[Router, torch.dtype, str, str]] = [
    (softmax, HALF, "f16", "f32"),
    (softmax_twice, HALF, "f16", "f32"),
    (renormalised, BRAIN, "bf16", "f32"),
    (sigmoid, BRAIN, "bf16", "f32"),
    (biased, HALF, "f16", "f16"),
    (biased_in_float32, BRAIN, "bf16", "f32"),
    (grouped, BRAIN, "bf16", "bf16"),
    (narrowed, HALF, "f16", "f32"),
    (in_float32, BRAIN, "f32", "f32"),
    (after, HALF, "f32", "f32"),
]


@pytest.mark.parametrize(("router", "dtype", "scores", "choice"), ORDERS)
def test_choices_are_those_of_eager(
    router: Router, dtype: torch.dtype, scores: str, choice: str
) -> None:
    layer = Layer(router, dtype).eval()
    example = torch.randn(6, WIDTH).to(dtype)
    compiled = moec.compile(layer, (example,), build=False, verify=False)
    for scale in (0.1, 1.0, 8.0, 60.0):
        x = (torch.randn(200, WIDTH) * scale).to(dtype)
        with torch.no_grad(), FirstOfEquals():
            expected = layer.router(layer.gate(x), layer.bias)[1].sort(-1).values
        after_passes = list(choices(compiled, x))
        assert after_passes
        for op, ids in after_passes:
            assert op.attrs.get("score_dtype", "f32") == scores
            assert op.attrs.get("choice_dtype", "f32") == choice
            assert torch.equal(ids, expected)


def test_another_rounding_declines_the_router() -> None:
    layer = Layer(chosen_across, BRAIN).eval()
    compiled = moec.compile(layer, (torch.randn(6, WIDTH).to(BRAIN),), build=False, verify=False)
    assert len(compiled.blocks) == 1
    words = "its scores are rounded to 16 bits where no known routing rounds"
    assert [words in one.reason for one in compiled.declined] == [True]
    x = torch.randn(400, WIDTH).to(BRAIN)
    program = compiled.pass_results[-1].program
    with torch.no_grad(), FirstOfEquals():
        expected = layer(x)
        actual = evaluate(program.graph, [x], program.weights)[0]
    assert distance(actual, expected) < 0.03
