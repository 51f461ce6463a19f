"""A user's forward of a module is compared with the module's own, and captured in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.capture.behaviour.describe import Failure
from moec.errors import CaptureError, InputError, UsageError
from moec.ir.interpret.evaluate import evaluate
from tests.capture.behaviour import look_alikes
from tests.capture.behaviour.modules import TOP_K, WIDTH, CountsInNumpy, ExpertChoice, Layer

SIZES = ((2, 12), (1, 1), (3, 29), (1, 5), (2, 0))


def compiled(
    description: Any, module: nn.Module | None = None, **options: Any
) -> moec.CompiledModel:
    torch.manual_seed(0)
    module = (CountsInNumpy() if module is None else module).eval()
    dtype = next(module.parameters()).dtype
    x = torch.randn(2, 12, WIDTH, dtype=dtype)
    options = {"build": False} | options
    return moec.compile(module, (x,), descriptions=[description], **options)


def plain(module: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, WIDTH)
    weights, ids = module.choose(flat)
    return summed(module, flat, weights, ids).view_as(x)


def summed(
    module: Layer, flat: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    y = torch.zeros_like(flat)
    for index, expert in enumerate(module.experts):
        token, slot = torch.where(ids == index)
        y = y.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
    return y


def without_renormalising(module: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, WIDTH)
    weights, ids = module.gate(flat).softmax(-1).topk(TOP_K, -1)
    return summed(module, flat, weights, ids).view_as(x)


def of_one_expert(module: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, WIDTH)
    weights, ids = module.choose(flat)
    return summed(module, flat, weights[:, :1], ids[:, :1]).view_as(x)


def scaled(module: Layer, x: torch.Tensor) -> torch.Tensor:
    return 1.01 * plain(module, x)


def test_a_right_description_is_captured_as_a_block() -> None:
    module = CountsInNumpy().eval()
    result = compiled(moec.describe(CountsInNumpy, forward=plain), module)
    assert [(b.experts, b.router) for b in result.blocks] == [(4, "softmax, top-2, renormalised")]
    program = result.pass_results[-1].program
    for size in SIZES:
        x = torch.randn(*size, WIDTH)
        with torch.no_grad():
            (y,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(module)
    text = " ".join(str(result.report()).split())
    assert "the model, a CountsInNumpy (modules.py:" in text
    assert "was described by the user: its forward and the user's agree at" in text


@pytest.mark.parametrize("wrong", [without_renormalising, of_one_expert, scaled])
def test_a_wrong_description_is_refused_with_the_sizes_that_show_it(
    wrong: Callable[..., torch.Tensor],
) -> None:
    with pytest.raises(CaptureError) as raised:
        compiled(moec.describe(CountsInNumpy, forward=wrong))
    text = str(raised.value)
    assert "a CountsInNumpy (modules.py:" in text
    assert "is not what it is described to be: the two forwards differ on inputs of (2, 12" in text


@pytest.mark.parametrize(
    "kind",
    [
        look_alikes.Threshold,
        look_alikes.ClampedLogits,
        look_alikes.RoundedWeights,
        look_alikes.LateCapacity,
        look_alikes.CapacityOfOneExpert,
        look_alikes.ClampedOutput,
        look_alikes.Growing,
        look_alikes.WrongBeyond,
        look_alikes.WrongFarBeyond,
        look_alikes.OneTokenAlone,
        look_alikes.TokensMeet,
        look_alikes.TokensMeetInTheRouter,
    ],
)
def test_what_nearly_is_what_it_is_described_to_be_is_refused(
    kind: type[look_alikes.LookAlike],
) -> None:
    words = rf"a {kind.__name__} \(look_alikes.py:.*: the two forwards differ on inputs of \("
    with pytest.raises(CaptureError, match=words):
        compiled(moec.describe(kind, forward=plain), kind())


def test_more_tokens_than_were_compared_are_refused(tmp_path: Path) -> None:
    module = CountsInNumpy().eval()
    described = moec.describe("CountsInNumpy", forward=plain)
    model = compiled(described, module, build=True, verify=False)
    x = torch.randn(256, 16, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "counts.moec")
    for each in (model, moec.load(tmp_path / "counts.moec")):
        with pytest.raises(InputError, match=r"B\*S is 4112, .* for at most 4096"):
            each(torch.randn(257, 16, WIDTH))


class Noted(Layer):
    """Notes in a file the numbers of tokens of the calls of its own forward: what it noted in
    Python would be put back."""

    file: Path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.file.open("a") as file:
            file.write(f"{int(x.shape[0])}\n")
        weights, ids = self.choose(x)
        pairs = ids.tolist()
        rows = [
            sum(w * self.experts[i](row) for w, i in zip(weights[n], pair, strict=True))
            for n, (row, pair) in enumerate(zip(x, pairs, strict=True))
        ]
        return torch.stack(rows) if rows else x


def test_the_forward_of_a_described_module_is_captured_at_no_size(tmp_path: Path) -> None:
    """For sizes that the graph excludes there is no second program: it would be one of the loop
    over tokens, at more of them than were compared."""
    torch.manual_seed(0)
    module = Noted().eval()
    module.file = tmp_path / "seen"
    described = moec.describe(Noted, forward=plain)
    model = moec.compile(module, (torch.randn(12, WIDTH),), verify=False, descriptions=[described])
    assert max(map(int, module.file.read_text().split())) == 4096
    assert model.captured.beyond == ()
    assert list(model.package.functions) == ["main"]


def test_sixteen_bits_are_compared_in_float32() -> None:
    result = compiled(
        moec.describe(CountsInNumpy, forward=plain), CountsInNumpy().bfloat16(), build=False
    )
    assert len(result.blocks) == 1
    with pytest.raises(CaptureError, match="the two forwards differ"):
        compiled(moec.describe(CountsInNumpy, forward=scaled), CountsInNumpy().bfloat16())


@pytest.mark.parametrize(
    ("kind", "forward", "words"),
    [
        ("Other", plain, "Other is described, and the model has no module of that class"),
        (5, plain, "5 is no class of modules: give the class, or its name"),
        (dict, plain, "<class 'dict'> is no class of modules"),
        (CountsInNumpy, 5, "forward is 5: give a function of a module and its inputs"),
    ],
)
def test_what_is_no_description(kind: Any, forward: Any, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        compiled(moec.describe(kind, forward=forward))
    assert words in str(raised.value)


def test_a_forward_that_fails_is_refused_with_its_error() -> None:
    words = "the user's forward is not captured"
    with pytest.raises(CaptureError, match=words):
        compiled(moec.describe(CountsInNumpy, forward=lambda module, x: module.door(x)))


def test_a_refusal_names_the_module_the_line_and_what_to_do() -> None:
    module = ExpertChoice().eval()
    with pytest.raises(CaptureError) as raised:
        moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    text = str(raised.value)
    assert "if the model, a ExpertChoice (modules.py:" in text
    assert "describe it: moec.describe(ExpertChoice, forward=...)" in text


class ReadsTokens(ExpertChoice):
    """Before it chooses, it reads the number of a token into Python, and loops as often."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for token in torch.where(x[..., 0] > 0)[0].tolist():
            x = x + token
        return super().forward(x)


def test_a_refusal_also_says_why_it_was_not_traced() -> None:
    module = ReadsTokens().eval()
    with pytest.raises(CaptureError) as raised:
        moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    text = str(raised.value)
    assert len(text.splitlines()) <= 5
    assert "for token in torch.where" in text
    assert "a loop over rows, as many as the data say, cannot be unrolled" in text
    assert "the model, a ReadsTokens (test_describe.py:" in text


def test_a_failure_is_at_the_last_line_of_the_user() -> None:
    """Not at one of the standard library's, such as a context manager that an error leaves by."""

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        yield

    def fail() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(inside())
            raise ValueError("no")  # here

    with pytest.raises(ValueError, match="no") as raised:
        inside()(fail)()
    failure = Failure.of(raised.value, nn.Identity())
    assert 'raise ValueError("no")  # here' in str(failure.line)
