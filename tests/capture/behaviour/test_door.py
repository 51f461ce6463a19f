"""Modules are captured by their descriptions, or refused with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import moec
from moec.capture.behaviour.failure import Failure
from moec.capture.behaviour.hints import as_hints, describe_by_hints
from moec.capture.behaviour.layer.arguments import Arguments
from moec.errors import CaptureError, InputError, NoMatch
from moec.interpret.evaluate import evaluate
from tests.capture.behaviour import loops
from tests.capture.behaviour.modules import HINTS, WIDTH, CountsInNumpy

SIZES = ((2, 12), (1, 1), (3, 29), (1, 5))


def assert_equal(compiled: moec.CompiledModel, module: nn.Module) -> None:
    """The last graph gives eager's numbers at several sizes: sums of at most three results of
    float32 experts, in any order."""
    program = compiled.pass_results[-1].program
    for size in SIZES:
        x = torch.randn(*size, WIDTH)
        with torch.no_grad():
            expected = tree_leaves(module(x))
        results = evaluate(program.graph, [x], program.weights)
        for result, leaf in zip(results, expected, strict=True):
            torch.testing.assert_close(result, leaf, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "hints", "experts", "router"),
    [
        (CountsInNumpy, HINTS, 4, "softmax, top-2, renormalised"),
        (
            loops.DeepSeekLike,
            {
                "router": "gate.weight", "experts": "experts", "top_k": 3, "score": "sigmoid",
                "correction": "gate.bias", "groups": [4, 2, 2], "renormalise": True, "scale": 2.5,
                "shared": "shared_experts",
            },
            8,
            "sigmoid, correction bias, best 2 of 4 groups by top2sum, top-3, renormalised, "
            "times 2.5",
        ),
        (
            loops.DiTLike,
            {"router": "gate", "experts": "experts", "top_k": 2, "shared": "shared"},
            4,
            "softmax, top-2",
        ),
        (
            loops.SwitchLike,
            {
                "router": "router", "experts": "experts", "top_k": 1,
                "capacity": {"factor": 1.25, "per": "sequence", "round_up": True},
            },
            4,
            "custom, some choices replaced",
        ),
        (
            loops.NumpyRouting,
            {
                "router": "wg", "experts": "experts", "top_k": 2, "score": "sigmoid",
                "renormalise": True, "eps": 1e-20, "scale": 1.5,
            },
            4,
            "sigmoid, top-2, renormalised, times 1.5",
        ),
        (
            loops.ByKeyword,
            {"router": "gate", "experts": "experts", "top_k": 2, "shared": "shared"},
            4,
            "softmax, top-2",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_loop_that_reads_data_becomes_a_block(
    kind: type[nn.Module], hints: dict[str, Any], experts: int, router: str
) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    layer = loops.KeywordLayer if kind is loops.ByKeyword else kind
    x = torch.randn(2, 12, WIDTH)
    described = [moec.describe(layer, **hints)]
    compiled = moec.compile(module, (x,), build=False, descriptions=described)
    (block,) = compiled.blocks
    assert (block.experts, block.router) == (experts, router)
    assert_equal(compiled, module)
    assert all("forward" not in vars(part) for part in module.modules())


def test_more_tokens_than_were_compared_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CountsInNumpy().eval()
    observed, x = moec.describe(CountsInNumpy, **HINTS), torch.randn(2, 12, WIDTH)
    compiled = moec.compile(module, (x,), verify=False, descriptions=[observed])
    (limits,) = (b for size, b in compiled.graph.bounds.items() if size == "B*S")
    most = limits.high or 0
    assert 1024 <= most <= 32_768
    assert f"and once {most}, agree" in compiled.captured.notes[-1]
    x = torch.randn(most // 16, 16, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    compiled.save(tmp_path / "counts.moec")
    for model in (compiled, moec.load(tmp_path / "counts.moec")):
        with pytest.raises(InputError, match=rf"B\*S is {most + 16}, .* for at most {most}"):
            model(torch.randn(most // 16 + 1, 16, WIDTH))


def test_weights_on_the_side_of_the_input_are_described_and_run() -> None:
    torch.manual_seed(0)
    module = loops.InputSide().eval()
    described = moec.describe(
        loops.InputSide, router="gate", experts="experts", top_k=1, weighs="input"
    )
    compiled = moec.compile(module, (torch.randn(2, 12, WIDTH),), descriptions=[described])
    assert [block.router for block in compiled.blocks] == ["softmax, top-1, softmax"]
    for size in SIZES:
        x = torch.randn(*size, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_a_refusal_names_the_module_the_line_and_what_to_do() -> None:
    module = loops.ExpertChoice().eval()
    with pytest.raises(CaptureError) as raised:
        moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    text = str(raised.value)
    assert "if the model, a ExpertChoice (loops.py:" in text
    assert "describe it: moec.describe(ExpertChoice, router=..., experts=..., top_k=...)" in text


class ReadsTokens(loops.ExpertChoice):
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
    assert "the model, a ReadsTokens (test_door.py:" in text


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


def test_the_report_says_how_and_on_what_it_was_proved() -> None:
    module = CountsInNumpy().eval()
    declared = [moec.describe(CountsInNumpy, **HINTS)]
    x = torch.randn(2, 12, WIDTH)
    compiled = moec.compile(module, (x,), build=False, descriptions=declared)
    text = " ".join(str(compiled.report()).split())
    assert "a CountsInNumpy (modules.py:" in text
    assert "was described by the user: experts=(experts.0, ..., experts.3)" in text
    assert "routing=(score=softmax, top_k=2, renormalise=True)" in text
    assert "runs next to eager, tokens scaled by 0.01 to 1000, up to 4097 tokens" in text


def test_sixteen_bits_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    module = CountsInNumpy().eval().bfloat16()
    x = torch.randn(2, 12, WIDTH, dtype=torch.bfloat16)
    compiled = moec.compile(
        module, (x,), build=False, descriptions=[moec.describe(CountsInNumpy, **HINTS)]
    )
    assert len(compiled.blocks) == 1
    program = compiled.pass_results[-1].program
    (result,) = evaluate(program.graph, [x], program.weights)
    assert result.dtype is torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(result, module(x), rtol=2e-2, atol=2e-2)  # a few roundings


class WithLoss(CountsInNumpy):
    """Also gives a loss that is float32 whatever the module is."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(x.view(-1, WIDTH)).float()
        return super().forward(x), logits.logsumexp(-1).square().mean()


class WithFirstChoices(CountsInNumpy):
    """Top-2, with the loss and the counts of the first choices (GShard, arXiv 2006.16668)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = x.view(-1, WIDTH)
        scores, (_, ids) = self.gate(flat).softmax(-1), self.choose(flat)
        first = F.one_hot(ids[:, 0], scores.shape[-1])
        loss = (scores.mean(0) * first.float().mean(0)).mean() * scores.shape[-1] ** 2
        return super().forward(x), loss, first.sum(0)


def test_the_loss_and_the_counts_of_first_choices_are_outputs() -> None:
    torch.manual_seed(0)
    module = WithFirstChoices().eval()
    x = Arguments.of((torch.randn(2, 12, WIDTH),), {})
    description = describe_by_hints(module, x, as_hints(**HINTS)).description
    assert description is not None
    names = [getattr(output, "name", None) for output in description.outputs]
    assert names[1:] == ["switch loss of first choices", "counts of first choices"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_output_keeps_the_dtype_that_the_module_gives_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = WithLoss().eval().to(dtype)
    x = torch.randn(2, 12, WIDTH, dtype=dtype)
    compiled = moec.compile(
        module, (x,), build=False, descriptions=[moec.describe(WithLoss, **HINTS)]
    )
    program = compiled.pass_results[-1].program
    with torch.no_grad():
        expected = module(x)
    for result, tensor in zip(evaluate(program.graph, [x], program.weights), expected, strict=True):
        # dtypes too; bfloat16 rounds to 8 bits, and the loss is a mean of such
        torch.testing.assert_close(result, tensor, rtol=2e-2, atol=2e-2)


def test_a_choice_that_is_an_input() -> None:
    x, ids = torch.randn(2, 12, WIDTH), torch.randint(0, 4, (2, 12))
    with pytest.raises(NoMatch, match=r"it reads a tensor of shape \(2, 12\) besides its tokens"):
        Arguments.of((x, ids), {})


def test_no_tokens() -> None:
    torch.manual_seed(0)
    module = CountsInNumpy().eval()
    x = torch.randn(2, 12, WIDTH)
    compiled = moec.compile(
        module, (x,), build=False, descriptions=[moec.describe(CountsInNumpy, **HINTS)]
    )
    program = compiled.pass_results[-1].program
    (result,) = evaluate(program.graph, [x[:, :0]], program.weights)
    assert result.shape == module(x[:, :0]).shape == (2, 0, WIDTH)
