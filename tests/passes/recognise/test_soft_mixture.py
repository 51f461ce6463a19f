"""Experts of slots, which are weighted sums of all tokens, are one node; look-alikes are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.codegen.backends.cpu.grouped import check_linears
from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.text import parse, print_graph
from moec.passes.recognise.own_rows import FORM as OWN_ROWS
from tests.passes.agreement import assert_agrees, programs_after

D, H, E, P = 6, 10, 3, 2


class Soft(nn.Module):
    """The paper's layer: phi [D, E, P], normalised and scaled; a list of experts."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(D, experts, slots))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(experts)
        )

    def logits(self, x: Tensor) -> Tensor:
        phi = self.scale * F.normalize(self.phi, dim=0)
        return torch.einsum("bsd,dep->bsep", F.normalize(x, dim=-1), phi)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return logits.softmax(1), logits.flatten(2).softmax(-1).view_as(logits)

    def run(self, slots: Tensor) -> Tensor:
        return torch.stack([f(slots[:, e]) for e, f in enumerate(self.experts)], 1)

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        outs = self.run(torch.einsum("bsd,bsep->bepd", x, dispatch))
        return torch.einsum("bepd,bsep->bsd", outs, combine)


class WrittenOut(Soft):
    """The softmax over experts and slots is written out; results are concatenated."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)

        def softmax(dims: tuple[int, ...]) -> Tensor:
            power = (logits - logits.amax(dims, keepdim=True)).exp()
            return power / power.sum(dims, keepdim=True)

        return softmax((1,)), softmax((2, 3))

    def run(self, slots: Tensor) -> Tensor:
        parts = slots.flatten(1, 2).chunk(len(self.experts), 1)
        return torch.cat([f(p) for f, p in zip(self.experts, parts, strict=True)], 1).view_as(slots)


class Stacked(Soft):
    """Stacks of weights, by einsums, and gated."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.up = nn.Parameter(torch.randn(experts, D, 2 * H) * 0.4)
        self.bias = nn.Parameter(torch.randn(experts, 2 * H) * 0.4)
        self.down = nn.Parameter(torch.randn(experts, H, D) * 0.4)

    def run(self, slots: Tensor) -> Tensor:
        both = torch.einsum("bepd,edh->beph", slots, self.up) + self.bias[:, None]
        gate, up = both.chunk(2, -1)
        return torch.einsum("beph,ehd->bepd", F.silu(gate) * up, self.down)


class ExpertsFirst(Soft):
    """Slots go to the experts as [E, B, P, D], in a batched product."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.up = nn.Parameter(torch.randn(experts, D, D) * 0.4)

    def run(self, slots: Tensor) -> Tensor:
        rows = slots.transpose(0, 1).flatten(1, 2)
        outs = F.relu(torch.bmm(rows, self.up))
        return outs.view(slots.shape[1], slots.shape[0], -1, D).transpose(0, 1)


class SlotMajor(Soft):
    """phi [D, P, E]: the slots of an expert are not consecutive."""

    def forward(self, x: Tensor) -> Any:
        logits = x @ self.phi.transpose(1, 2).flatten(1)
        slots = logits.softmax(1).mT @ x
        rows = slots.view(x.shape[0], -1, len(self.experts), D)
        outs = torch.stack([f(rows[:, :, e]) for e, f in enumerate(self.experts)], 2)
        return logits.softmax(-1) @ outs.flatten(1, 2)


class OneText(Soft):
    """Tokens [S, D], without an axis of texts."""

    def forward(self, x: Tensor) -> Any:
        logits = x.flatten(0, 1) @ self.phi.flatten(1)
        slots = logits.softmax(0).T @ x.flatten(0, 1)
        parts = [f(p) for f, p in zip(self.experts, slots.chunk(len(self.experts)), strict=True)]
        return (logits.softmax(1) @ torch.cat(parts)).view_as(x)


class TwoPhis(Soft):
    """Another phi for the combine: refined, the node takes two logits."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.phi.flatten(1).roll(1, 0)
        return super().weights(x)[0], logits.softmax(-1).view(*x.shape[:2], *self.phi.shape[1:])


class Masked(Soft):
    """Some tokens add nothing to the slots: the mask is before the node."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        away = (x[..., :1, None] > 0.5) & (torch.arange(x.shape[1]) > 0)[:, None, None]
        return logits.masked_fill(away, -1e9).softmax(1), super().weights(x)[1]


class Looped(Soft):
    """A loop over the experts adds what each gives."""

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots = torch.einsum("bsd,bsp->bpd", self.tokens(x, e), dispatch[:, :, e])
            y = y + torch.einsum("bpd,bsp->bsd", expert(slots), combine[:, :, self.other(e)])
        return y

    def tokens(self, x: Tensor, expert: int) -> Tensor:
        return x

    def other(self, expert: int) -> int:
        return expert


class LoopedParts(Soft):
    """The weights of an expert are a part of the last axis, the last expert's first."""

    def forward(self, x: Tensor) -> Any:
        logits = x @ self.phi.flatten(1)
        dispatch, combine = logits.softmax(1), logits.softmax(-1)
        parts = []
        for e in reversed(range(E)):
            part = slice(e * P, (e + 1) * P)
            parts.append(combine[..., part] @ self.experts[e](dispatch[..., part].mT @ x))
        return sum(parts)


class LoopedToOthers(Looped):
    """What an expert gives goes where the weights of another say."""

    def other(self, expert: int) -> int:
        return (expert + 1) % E


class LoopedOverOthers(Looped):
    """The last expert reads other tokens."""

    def tokens(self, x: Tensor, expert: int) -> Tensor:
        return x * 2 if expert == E - 1 else x


class SlotsFirst(Soft):
    """The dispatch is a softmax over the slots."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        combine = super().weights(x)[1]
        return combine, combine


class ByExpert(Soft):
    """The combine is a softmax over the slots of each expert."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().weights(x)[0], self.logits(x).softmax(-1)


class MaskedAfter(Soft):
    """The weights of some tokens are zero, and the others do not sum to one."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().weights(x)
        return dispatch * (x[..., :1, None] > 0).float(), combine


class Renormalised(Soft):
    """Dispatch weights are divided by their sum over the slots."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().weights(x)
        return dispatch / dispatch.sum((2, 3), keepdim=True), combine


class OtherKinds(Soft):
    """One of the experts is of another kind."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.experts[1] = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


class Mixed(Soft):
    """The slots of an expert act on one another."""

    def run(self, slots: Tensor) -> Tensor:
        return super().run(slots - slots.mean(2, keepdim=True))


class ReadsTokens(Soft):
    """What the experts give is scaled by the tokens' mean."""

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        outs = self.run(torch.einsum("bsd,bsep->bepd", x, dispatch))
        outs = outs * x.mean(1)[:, None, None]
        return torch.einsum("bepd,bsep->bsd", outs, combine)


class Uneven(Soft):
    """The last expert has one slot, the others have three."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(D, 7, 1))

    def run(self, slots: Tensor) -> Tensor:
        parts = slots.flatten(1, 2).chunk(E, 1)
        return torch.cat([f(p) for f, p in zip(self.experts, parts, strict=True)], 1).view_as(slots)


class OneReadsTokens(Soft):
    """The one expert reads the tokens' mean beside its slots."""

    def __init__(self) -> None:
        super().__init__(1, P)

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        slots = torch.einsum("bsd,bsep->bepd", x, dispatch)
        outs = self.experts[0](slots.flatten(1, 2) + x.mean(1, keepdim=True))
        return torch.einsum("bepd,bsep->bsd", outs.view_as(slots), combine)


class Attention(nn.Module):
    """Two layers of attention over learned keys, one behind the other: no experts of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.layer = nn.Parameter(torch.randn(2, 4, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        pooled = (self.keys[0] @ x.mT).softmax(-1) @ x
        pooled = self.layer(pooled)
        return (pooled @ pooled.mT).softmax(-1) @ pooled


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
        (MaskedAfter, "aten.mul.Tensor stands between a softmax and the dispatch that it weighs"),
        (Renormalised, "aten.div.Tensor stands between a softmax and the dispatch that it weighs"),
        (OtherKinds, "its experts differ in more than their weights"),
        (Mixed, "is no work of experts"),
        (ReadsTokens, "is no work of experts"),
        (Uneven, "its 7 slots are not as many for each of 3 experts"),
        (LoopedToOthers, "weigh the slots and the tokens of experts [(2, 0), (0, 1), (1, 2)]"),
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
    with pytest.raises(NoMatch, match="not as many as its experts share out evenly"):
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
