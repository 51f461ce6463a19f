"""Experts of slots, which are weighted sums of all tokens, are one node; look-alikes are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moec
from moec.codegen.backends.cpu.grouped import check_linears
from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.text import parse, print_graph
from moec.passes.recognise.forms.stacks.batched import FORM as OWN_ROWS
from tests.passes.agreement import assert_agrees, programs_after
from tests.passes.forms.soft import (
    Attention,
    ByExpert,
    D,
    E,
    ExpertsFirst,
    Looped,
    LoopedOverOthers,
    LoopedParts,
    LoopedToOthers,
    Masked,
    MaskedAfter,
    Mixed,
    OneReadsTokens,
    OneText,
    OtherKinds,
    ReadsTokens,
    Renormalised,
    SlotMajor,
    SlotsFirst,
    Soft,
    Stacked,
    TwoPhis,
    Uneven,
    WrittenOut,
)

FORMS = (
    Soft, WrittenOut, Stacked, ExpertsFirst, SlotMajor, OneText, TwoPhis, Masked,
    Looped, LoopedParts,
)  # fmt: skip


@cache
def compiled(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = kind().eval()
    example = (torch.randn(2, 5, D),)
    return module, moec.compile(module, example, stop_after="expand-soft-mixtures")


def programs(steps: Any) -> list[Program]:
    return programs_after(steps, "recognise-experts", "expand-soft-mixtures")


@pytest.mark.parametrize("kind", FORMS)
def test_one_node_and_back(kind: type[nn.Module]) -> None:
    _, steps = compiled(kind)
    node, out = programs(steps)
    assert [op.name for op in node.graph.ops].count("moe.soft_mixture") == 1
    assert not any(op.name in ("moe.soft_mixture", "moe.sort") for op in out.graph.ops)
    assert any(op.name == "grouped.linear" for op in out.graph.ops)
    (block,) = steps.blocks
    assert (block.experts, block.top_k) == (E, E)
    assert block.form == "soft mixture of 3 experts with 2 slots"
    assert block.router.startswith("softmax over tokens, softmax over slots")
    assert ("logits of its own" in block.router) == (kind in (TwoPhis, Masked))
    assert steps.declined == ()
    text = print_graph(node.graph)
    assert print_graph(parse(text)) == text


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", FORMS)
def test_any_size(kind: type[nn.Module], batch: int, tokens: int, seed: int) -> None:
    """f32 sums in another order, of at most nine tokens and six slots."""
    module, steps = compiled(kind)
    x = torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))
    assert_agrees(module, programs(steps), x)


@pytest.mark.parametrize(
    ("kind", "experts", "slots", "form"),
    [
        (Soft, 1, 3, "soft mixture of 1 expert with 3 slots"),
        (Soft, 3, 1, "soft mixture of 3 experts with 1 slot"),
        (Stacked, 1, 2, "soft mixture of 1 expert with 2 slots"),
        (Stacked, 2, 1, "soft mixture of 2 experts with 1 slot"),
    ],
)
def test_one_expert_or_one_slot(kind: type[Soft], experts: int, slots: int, form: str) -> None:
    torch.manual_seed(0)
    module = kind(experts, slots).eval()
    example = torch.randn(1, 1, D)
    steps = moec.compile(module, (example,), stop_after="expand-soft-mixtures")
    (block,) = steps.blocks
    assert block.form == form
    for x in (example, torch.randn(3, 4, D)):
        assert_agrees(module, programs(steps), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SlotsFirst, "its dispatch weights are a softmax over 3 x 2, not over the tokens, S"),
        (ByExpert, "its combine weights are a softmax over 2, not over all slots, 6"),
        (MaskedAfter, "aten.mul.Tensor is between a softmax and the dispatch that it weights"),
        (Renormalised, "aten.div.Tensor is between a softmax and the dispatch that it weights"),
        (OtherKinds, "its experts differ in more than their weights"),
        (Mixed, "are not experts"),
        (ReadsTokens, "are not experts"),
        (Uneven, "its 7 slots are not as many for each of 3 experts"),
        (
            LoopedToOthers,
            ("weight the slots and the tokens of different experts: [(2, 0), (0, 1), (1, 2)]"),
        ),
        (LoopedOverOthers, "its steps read different tokens"),
        (OneReadsTokens, "aten.add.Tensor joins rows with mean"),
    ],
)
def test_look_alikes_are_declined(kind: type[nn.Module], reason: str) -> None:
    _, steps = compiled(kind)
    assert all(block.form == OWN_ROWS for block in steps.blocks)  # their networks alone
    reasons = [line.reason for line in steps.declined]
    assert any(line.startswith("soft mixture: ") and reason in line for line in reasons), reasons


def test_rows_that_even_ends_do_not_share_out() -> None:
    """The kernel of products does not check that the ends are within its rows."""
    graph = parse(
        """
        graph main(x: f32[R, 4]; w: f32[2, 3, 4]) {
          ends: i32[2] = moe.even_ends() <num_experts=2, each={R}>
          y: f32[R, 3] = grouped.linear(x, ends, w) <matrices=1, dtype=f32>
          return y
        }
        """
    )
    with pytest.raises(NoMatch, match="not split evenly among the experts"):
        check_linears(graph.ops[1], graph)


def test_attention_is_none() -> None:
    _, steps = compiled(Attention)
    assert steps.blocks == ()
    assert not any("soft mixture" in line.reason for line in steps.declined)


def test_text(golden: Any) -> None:
    node, out = programs(compiled(Stacked)[1])
    golden(print_graph(node.graph) + "\n" + print_graph(out.graph))


SHAPES = ((2, 5), (1, 1), (3, 17))


@pytest.fixture(scope="module")
def model() -> Any:
    return moec.compile(compiled(SlotMajor)[0], (torch.randn(2, 5, D),), verify=False)


def test_compiled(model: Any) -> None:
    """The grouped kernels take the slots; f32 sums in another order."""
    module, _ = compiled(SlotMajor)
    assert "grouped" in model.blocks[0].kernel
    for shape in SHAPES:
        x = torch.randn(*shape, D)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)


def test_torch_compile() -> None:
    module, _ = compiled(SlotMajor)
    before = moec.stats()
    with torch.no_grad():
        model = torch.compile(module, backend="moec")
        for shape in SHAPES[::2]:
            x = torch.randn(*shape, D)
            torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)
    assert moec.stats().blocks > before.blocks
    assert moec.stats().fallbacks == before.fallbacks


def test_onnx(model: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module, _ = compiled(SlotMajor)
    exported = model.export_onnx(tmp_path / "soft.onnx", verify=False)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        x = torch.randn(*shape, D)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-5, atol=1e-5)
