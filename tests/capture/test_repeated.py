"""Layers that are alike are traced once; the graph is that of tracing all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from moec.capture import Captured, capture
from moec.ir.canonical import canonical_text
from moec.ir.interpret.evaluate import evaluate
from tests.models.families import FAMILIES

CAPTURE = importlib.import_module("moec.capture.capture")
D = 8


class Block(nn.Module):
    """A layer with experts in a list of its own, of which each row uses the better one."""

    def __init__(self, number: int, scale: float = 1.0, width: int = D) -> None:
        super().__init__()
        self.number, self.scale = number, scale
        self.router = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Linear(D, width) for _ in range(2))
        self.down = nn.Linear(width, D)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        gates = self.router(x).softmax(-1).unbind(-1)
        y = sum(g[..., None] * e(x) for g, e in zip(gates, self.experts, strict=True))
        y = self.scale * self.down(y.relu())
        return x + (y if keep is None else y * keep[..., None])


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("scale", torch.full((D,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) * self.scale
        keep = (x.sum(-1) > 0).to(x.dtype)
        for layer in self.layers:
            x = layer(x, keep)
        return x.tanh()


def blocks(count: int, **options: object) -> list[Block]:
    return [Block(number, **options) for number in range(count)]


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(*blocks(6)), Stack(*blocks(5, scale=0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


REPEATED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "list": (lambda: Stack(*blocks(6)), ["2 of the 6 layers of layers"]),
    "the root": (lambda: nn.Sequential(*blocks(5)), ["2 of the 5 layers of "]),
    "wide first": (
        lambda: Stack(Block(0, width=3 * D), *map(Block, range(1, 7))),
        ["3 of the 7 layers of layers"],
    ),
    "two kinds": (
        lambda: Stack(*(Block(n, scale=1 + n % 2) for n in range(8))),
        ["4 of the 8 layers of layers"],
    ),
    "two lists": (
        TwoLists,
        ["2 of the 6 layers of encoder.layers", "2 of the 5 layers of decoder.layers"],
    ),
}


def capture_all(
    model: nn.Module, caplog: pytest.LogCaptureFixture, kwargs: dict[str, object] | None = None
) -> tuple[Captured, Captured, list[str]]:
    """The capture of a model, one with all layers traced, and what the first one logs."""
    args = () if kwargs else (torch.randn(2, 3, D),)
    with caplog.at_level("INFO", "moec.capture.repeated"):
        repeated = capture(model, args, kwargs)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("moec.capture.repeated")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CAPTURE, "capture_repeated", lambda request, traced: None)
        return repeated, capture(model, args, kwargs), lines


def assert_same_graphs(one: Captured, other: Captured) -> None:
    texts = []
    for program in (one.program, other.program):
        params = tuple(sorted(program.graph.params, key=lambda value: value.name))
        texts.append(canonical_text(replace(program.graph, params=params)))
        assert {op.origin for op in one.program.graph.ops} == {
            op.origin for op in program.graph.ops
        }
    assert texts[0] == texts[1]
    for name, weight in other.program.weights.items():
        assert one.program.weights[name].data_ptr() == weight.data_ptr()
        # results of a program whose weights want gradients keep what they were computed of
        assert not any(w.requires_grad for w in (one.program.weights[name], weight))


def assert_equals_eager(captured: Captured, model: nn.Module) -> None:
    for shape in ((1, 1, D), (4, 7, D), (2, 0, D)):
        x = torch.randn(shape)
        graph, weights = captured.program.graph, captured.program.weights
        torch.testing.assert_close(evaluate(graph, [x], weights)[0], model(x))


@pytest.mark.parametrize("name", REPEATED)
def test_the_graph_is_that_of_all_layers(name, caplog):
    build, words = REPEATED[name]
    torch.manual_seed(0)
    model = build()
    repeated, every, lines = capture_all(model, caplog)
    assert lines == [f"{text} were traced" for text in words]
    assert_same_graphs(repeated, every)
    assert_equals_eager(repeated, model)
    names = [value.name for value in repeated.program.graph.values()]
    assert len(names) == len(set(names))


def test_a_family_of_transformers(caplog):
    """Its layers have two kinds of masks in turns."""
    few = FAMILIES["gpt_oss"]
    model = replace(few, fields={**few.fields, "num_hidden_layers": 8}).build()
    repeated, every, lines = capture_all(model, caplog, few.inputs(2, 5))
    assert lines == ["4 of the 8 layers of model.layers were traced"]
    assert_same_graphs(repeated, every)
    assert (repeated.fixed, repeated.notes) == (every.fixed, every.notes)


class ReadsNumber(Block):
    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x, keep)
        return y * 1.01 if self.number == 4 else y


class ReadsNumberOfLongRows(Block):
    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x, keep)
        return y * 2 if x.shape[1] > 5 and self.number >= 4 else y


class OtherMasks(Stack):
    """The later layers get another mask, which is equal on the example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.ones_like(x[..., 0])
        near = (torch.arange(x.shape[1]) < 6).to(x.dtype) * keep
        for layer, mask in zip(self.layers, [keep] * 3 + [near] * 3, strict=False):
            x = layer(x, mask)
        return x


class LoopOfLongRows(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, x.sum(-1) if number > 3 and x.shape[1] > 5 else None)
        return x


class SumOfLayers(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for layer in self.layers:
            x = layer(x)
            total = total + x
        return total


class ReturnsLayers(Stack):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for layer in self.layers:
            x = layer(x)
            results.append(x)
        return tuple(results[::-1])


class Between(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer(x)
            x = layer(x) + 1
        return x


class LastOneIsOther(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, None if number + 1 < len(self.layers) else x.sum(-1))
        return x


class Parallel(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) for layer in self.layers)


class Reversed(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def tied() -> nn.Module:
    stack = Stack(*blocks(6))
    stack.layers[4].down.weight = stack.layers[3].down.weight
    return stack


def one_module() -> nn.Module:
    return Stack(*[Block(0)] * 6)


def tensors_as_attributes() -> nn.Module:
    stack = Stack(*blocks(6))
    for layer in stack.layers:
        layer.scale = torch.rand(D)
    return stack


ONE_BY_ONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer reads its number": (lambda: Stack(*map(ReadsNumber, range(7))), ""),
    "a layer reads its number for long rows": (
        lambda: Stack(*map(ReadsNumberOfLongRows, range(7))),
        "",
    ),
    "a loop reads numbers for long rows": (lambda: LoopOfLongRows(*blocks(6)), ""),
    "other masks": (lambda: OtherMasks(*blocks(6)), ""),
    "other numbers as attributes": (lambda: Stack(*(Block(n, scale=n / 3) for n in range(6))), ""),
    "other tensors as attributes": (tensors_as_attributes, ""),
    "one module": (one_module, ""),
    "few layers": (lambda: Stack(*blocks(4)), ""),
    "called in parallel": (lambda: Parallel(*blocks(6)), ""),
    "called in reverse": (lambda: Reversed(*blocks(6)), ""),
    "results are added": (
        lambda: SumOfLayers(*blocks(6)),
        "alike layers are traced one by one: other code runs between them",
    ),
    "results are returned": (
        lambda: ReturnsLayers(*blocks(6)),
        "alike layers are traced one by one: they exchange more than one tensor",
    ),
    "code between": (lambda: Between(*blocks(6)), ""),
    "the last one gets other arguments": (lambda: LastOneIsOther(*blocks(6)), ""),
    "tied weights": (tied, ""),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_other_layers_are_traced_one_by_one(name, caplog):
    build, reason = ONE_BY_ONE[name]
    torch.manual_seed(0)
    model = build()
    captured, every, lines = capture_all(model, caplog)
    assert lines == ([reason] if reason else [])
    assert_same_graphs(captured, every)
    bounds = captured.program.graph.bounds
    assert {n: b.high for n, b in bounds.items()} == {"B": None, "S": 5 if "long" in name else None}
    if name != "results are returned" and "long" not in name:
        assert_equals_eager(captured, model)


def test_repeated_layers_are_compared_with_the_model(caplog, monkeypatch):
    """What equal operators do not show, weights that the copies take from another layer do."""
    unroll = importlib.import_module("moec.capture.repeated.capture")
    path_of = unroll.LayerList.path_of
    monkeypatch.setattr(
        unroll.LayerList, "path_of", lambda self, number: path_of(self, min(number, 4))
    )
    model = Stack(*blocks(6))
    captured, _, lines = capture_all(model, caplog)
    assert lines == ["alike layers are traced one by one: repeated, they compute something else"]
    assert_equals_eager(captured, model)


def test_the_model_is_whole_afterwards():
    model = Stack(*blocks(6))
    layers = list(model.layers)
    capture(model, (torch.randn(2, 3, D),))
    assert list(model.layers) == layers
    assert [name for name, _ in model.layers.named_children()] == list("012345")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
