"""A graph of only blocks and views is called without AOTAutograd, with the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.dynamo import compiler
from tests.dynamo.modules import Listed, Masked
from tests.passes.forms import rows
from tests.passes.forms.sizes import D

# float32 sums of a few dozen terms in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


class Shaped(Listed):
    """As layers of transformers: x[B, S, D], flattened before the block and not after it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, x.shape[-1])).reshape(x.shape)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="moec", dynamic=True, options={"strict": True, **options})


@pytest.fixture
def rest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each graph that goes through AOTAutograd."""
    calls: list[int] = []
    original = compiler.compile_rest

    def counted(*inputs: Any) -> Any:
        calls.append(1)
        return original(*inputs)

    monkeypatch.setattr(compiler, "compile_rest", counted)
    return calls


@pytest.mark.parametrize("how", ["eager", "inductor"])
def test_blocks_and_views(rest: list[int], how: str) -> None:
    model = Shaped().eval()
    run = compiled(model, rest=how)
    with torch.no_grad():
        for batch, length in ((2, 3), (4, 5), (3, 33)):
            x = torch.randn(batch, length, 16)
            before = x.clone()
            y = run(x)
            torch.testing.assert_close(y, model(x), **CLOSE)
            assert torch.equal(x, before)
            again = run(x)
            assert torch.equal(again, y)
            assert again.data_ptr() != y.data_ptr()
    assert not rest
    assert (moec.stats().compilations, moec.stats().blocks, moec.stats().packs) == (1, 1, 1)


@pytest.mark.parametrize("form", [rows.Added, rows.Masked, rows.SlotRows])
def test_of_a_loop_over_rows_nothing_is_left(rest: list[int], form: type[nn.Module]) -> None:
    """Not even the op that computes the number of rows."""
    model = moec.prepare(form().eval())
    run = compiled(model, rest="eager")
    with torch.no_grad():
        for tokens in (5, 2, 33):
            x = torch.randn(tokens, D)
            torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert not rest
    assert (moec.stats().compilations, moec.stats().blocks) == (1, 1)


def test_in_inference_mode(rest: list[int]) -> None:
    model = Shaped().eval()
    x = torch.randn(2, 3, 16)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(model)(x), model(x), **CLOSE)
    assert not rest


def test_other_operators_need_the_rest(rest: list[int]) -> None:
    model = Masked().eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, rest="eager")(x), model(x), **CLOSE)
    assert rest == [1]


def test_changed_weights_are_seen(rest: list[int]) -> None:
    model = Shaped().eval()
    run = compiled(model)
    x = torch.randn(2, 5, 16)

    def other_memory() -> None:
        model.experts[1][2].weight.data = torch.randn(16, 32)

    changes: list[Callable[[], Any]] = [
        lambda: model.experts[0][0].weight.mul_(1.5),
        other_memory,
        lambda: model.load_state_dict(Shaped().state_dict()),
    ]
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), **CLOSE)
        for packs, change in enumerate(changes, start=2):
            before = run(x)
            change()
            torch.testing.assert_close(run(x), model(x), **CLOSE)
            assert not torch.allclose(run(x), before)
            assert moec.stats().packs == packs
    assert not rest


def test_a_gradient_needs_the_rest(rest: list[int]) -> None:
    model = Shaped()
    run = compiled(model, rest="eager")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        run(x)
    assert not rest
    run(x).sum().backward()  # captured again: the grad mode is one of Dynamo's guards
    assert rest == [1]
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for result, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(result, p.grad, **CLOSE)
    frozen = Shaped().requires_grad_(False)
    rest.clear()
    assert not compiled(frozen)(x).requires_grad
    assert not rest


def test_python_of_a_call() -> None:
    """Beside what Dynamo itself runs: 25 calls when it was written, 85 with AOTAutograd."""
    x = torch.randn(1, 3, 16)
    answer = torch.randn(1, 3, 16)
    empty = torch.compile(Shaped().eval(), backend=lambda *_: lambda *_: (answer,), dynamic=True)
    with torch.no_grad():
        assert calls(compiled(Shaped().eval()), x) - calls(empty, x) <= 35


def calls(run: Any, x: Tensor) -> int:
    """The functions of Python that one more call runs."""
    run(x)
    run(x)
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        run(x)
    finally:
        sys.setprofile(None)
    return count
