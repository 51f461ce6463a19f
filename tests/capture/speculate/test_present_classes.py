"""Loops over the experts that occur among the chosen ids: `unique`, or lists of the ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

E, D, K = 3, 6, 2
Present = Callable[[Tensor, int], Iterator[tuple[Any, Any]]]
"""The experts and the rows that each takes, at most `capacity`; None for all rows of an expert."""


class Layer(nn.Module):
    """Tokens that meet in a mean, so that only a capture of the code is possible."""

    def __init__(self, *forms: Present) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.w = nn.Parameter(torch.randn(E, D, D))
        self.forms = forms

    def forward(self, x: Tensor) -> Tensor:
        flat = (x + x.mean(1, keepdim=True)).reshape(-1, D)
        weights, ids = self.gate(flat).softmax(-1).topk(K, -1)
        out = torch.zeros_like(flat)
        for present in self.forms:
            for expert, most in present(ids, max(1, flat.shape[0] * K // E)):
                token, slot = torch.where(ids == expert)
                token, slot = token[:most], slot[:most]
                rows = torch.tanh(flat[token] @ self.w[expert]) * weights[token, slot, None]
                out.index_add_(0, token, rows)
        return out.view(x.shape)


def unique_with_counts(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    experts, counts = torch.unique(ids, return_counts=True)
    for expert, count in zip(experts, counts, strict=True):
        yield int(expert), min(int(count), capacity)


def places_among_the_unique(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    experts, inverse = ids.unique(return_inverse=True)
    for index, expert in enumerate(experts.tolist()):
        if (inverse == index).any():
            yield expert, capacity


def consecutive(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    flat = ids.flatten()
    experts, counts = flat[flat.argsort()].unique_consecutive(return_counts=True)
    again = torch.unique_consecutive(flat.sort()[0])
    for expert, count, same in zip(experts.tolist(), counts.tolist(), again, strict=True):
        if count > 0 and expert == same:
            yield expert, capacity


PAIRS = [(unique_with_counts,), (places_among_the_unique, consecutive)]


@pytest.mark.parametrize("forms", PAIRS)
def test_experts_that_python_finds_among_the_ids(forms: tuple[Present, ...]) -> None:
    module = Layer(*forms).eval()
    captured = capture(module, (torch.randn(2, 5, D),))
    for shape in ((1, 1), (1, 2), (2, 7)):
        for x in (torch.randn(*shape, D), torch.ones(*shape, D)):
            (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
            with torch.no_grad():
                torch.testing.assert_close(actual, module(x), rtol=1e-5, atol=1e-5)


def the_place_counts(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    for index, expert in enumerate(ids.unique().tolist()):
        yield expert, index


def test_experts_without_rows_that_change_the_result_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"cannot be captured"):
        capture(Layer(the_place_counts).eval(), (torch.randn(2, 5, D),))


def a_loop_over_tokens(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    groups: dict[int, list[int]] = {}
    for token, (first, _) in enumerate(ids.tolist()):
        groups.setdefault(first, []).append(token)
    yield from ((expert, None) for expert in groups)


def a_set(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    yield from ((expert, capacity) for expert in set(ids.flatten().tolist()))


def a_counter(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    yield from Counter(ids.flatten().tolist()).items()


def a_count(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    chosen = ids.flatten().tolist()
    yield from ((expert, None) for expert in range(E) if chosen.count(expert))


def a_member(ids: Tensor, capacity: int) -> Iterator[tuple[Any, Any]]:
    chosen = ids.flatten().tolist()
    yield from ((expert, None) for expert in range(E) if expert in chosen)


@pytest.mark.parametrize(
    ("form", "line", "reason"),
    [
        (
            a_loop_over_tokens,
            "for token, (first, _) in enumerate(ids.tolist()):",
            "a loop over tok",
        ),
        (a_set, "for expert in set(ids.flatten().tolist()))", "a loop over tokens, whose number"),
        (a_counter, "yield from Counter(ids.flatten().tolist()).items()", "a loop over tokens, wh"),
        (a_count, "for expert in range(E) if chosen.count(expert))", "use torch.bincount(ids) ins"),
        (a_member, "for expert in range(E) if expert in chosen)", "compare the tensor of ids inst"),
    ],
)
def test_what_reads_the_ids_of_all_tokens_is_refused_with_its_line(
    form: Present, line: str, reason: str
) -> None:
    with pytest.raises(CaptureError) as refusal:
        capture(Layer(form).eval(), (torch.randn(2, 5, D),))
    assert line in str(refusal.value)
    assert reason in str(refusal.value)


class ByToken(nn.Module):
    """One token after the other, through the experts that it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for slot, expert in enumerate(ids[token].tolist()):
                out[token] += weights[token, slot] * self.experts[expert](x[token])
        return out


def test_an_expert_whose_number_is_read_is_refused_in_words_of_the_module() -> None:
    with pytest.raises(CaptureError) as refusal:
        capture(ByToken().eval(), (torch.randn(5, D),))
    assert "out[token] += weights[token, slot] * self.experts[expert]" in str(refusal.value)
    assert "choose experts with torch.where(ids == expert)" in str(refusal.value)
    assert "u0" not in str(refusal.value)


class SizesOfUnique(nn.Module):
    """Counts of the experts that occur, written at their places in a table for all experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.w = nn.Linear(D, E), nn.Parameter(torch.randn(E, D, D))

    def forward(self, x: Tensor) -> Tensor:
        ids, order = self.gate(x).argmax(-1).sort()
        experts, counts = torch.unique_consecutive(ids, return_counts=True)
        sizes = torch.zeros(E, dtype=torch.long)
        sizes[experts] = counts
        parts = x[order].split(sizes.tolist())
        rows = [part @ self.w[e] if len(part) else part for e, part in enumerate(parts)]
        occur = self.w[experts].sum() + self.w.sum() - self.w[experts].sum()
        return torch.cat(rows)[order.argsort()] + occur


def test_experts_that_occur_are_an_index() -> None:
    module = SizesOfUnique().eval()
    (graph, weights) = (p := capture(module, (torch.randn(9, D),)).program).graph, p.weights
    for x in (torch.randn(1, D), torch.randn(16, D), torch.ones(4, D)):
        with torch.no_grad():
            expected = module(x)
        (actual,) = evaluate(graph, [x], weights)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
