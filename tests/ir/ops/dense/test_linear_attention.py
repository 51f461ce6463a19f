"""nn.linear_attention: its reference against explicit attention, and the errors of its type
rule."""

from __future__ import annotations

import pytest
import torch

from moec.errors import IRError
from moec.ir.graph import Graph, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse


def graph(attrs: str = "", *, decay: str = "B, S, 4", extra: str = "", k: str = "2, 5") -> Graph:
    """q, k, v, decay, and the inputs in `extra`, written "name: type; name: type"."""
    parts = [part for part in extra.split("; ") if part]
    names = "".join(f", {part.split(':')[0].strip()}" for part in parts)
    typed = "".join(f", {part}" for part in parts)
    return parse(
        f"graph main(q: f32[B, S, 2, 5], k: f32[B, S, {k}], v: f32[B, S, 4, 3], "
        f"decay: f32[{decay}]{typed}) {{\n"
        "  size B in [0, inf]\n  size S in [0, inf]\n"
        "  y: f32[B, S, 4, 3], end: f32[B, 4, 5, 3] = "
        f"nn.linear_attention(q, k, v, decay{names}) <{attrs}>\n  return y, end\n}}\n"
    )


def draw(length: int) -> list[torch.Tensor]:
    shapes = ((2, length, 2, 5), (2, length, 2, 5), (2, length, 4, 3))
    return [*(torch.randn(shape) for shape in shapes), -torch.rand(2, length, 4)]


def test_without_a_rule_it_is_attention_under_decaying_weights() -> None:
    """y[t] = sum over s <= t of exp(sum of the decays after s) * (q[t] . k[s]) * v[s]."""
    q, k, v, decay = draw(9)
    total = decay.double().cumsum(1)
    spread = (total[:, :, None] - total[:, None, :]).exp() * torch.ones(9, 9).tril()[..., None]
    wide_q, wide_k = (x.double().repeat_interleave(2, dim=2) for x in (q, k))
    scores = torch.einsum("bthk,bshk->btsh", wide_q, wide_k) * spread
    want = torch.einsum("btsh,bshv->bthv", scores, v.double())
    program = graph()
    verify(program, Stage.ATEN)
    y, _ = evaluate(program, [q, k, v, decay])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_the_delta_rule_overwrites_what_a_key_held() -> None:
    """With beta 1, no decay and keys of length 1, a query with the last key reads its value."""
    _, k, v, decay = draw(6)
    k = k / k.norm(dim=-1, keepdim=True)
    program = graph("delta=true", extra="beta: f32[B, S, 4]")
    verify(program, Stage.ATEN)
    y, _ = evaluate(program, [k, k, v, decay * 0, torch.ones_like(decay)])
    torch.testing.assert_close(y, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["head", "key", "rate"])
def test_a_state_goes_on_where_it_stopped(per: str) -> None:
    tensors = draw(8)
    state = "f32[B, 4, 5, 3]"
    attrs, decay, rates = {
        "head": ("", "B, S, 4", []),
        "key": ("", "B, S, 4, 5", []),
        "rate": ("rated=true, ", "B, S, 4, 3", [torch.rand(4, 5, 3)]),
    }[per]
    shape = [2, 8, *map(int, decay.split(", ")[2:])]
    tensors[3] = -torch.rand(shape)
    extra = "rates: f32[4, 5, 3]; " if rates else ""
    full = graph(f"{attrs}delta=true", decay=decay, extra=f"{extra}beta: f32[B, S, 4]")
    beta = torch.rand(2, 8, 4)
    y, end = evaluate(full, [*tensors, *rates, beta])
    parts = graph(
        f"{attrs}delta=true, started=true",
        decay=decay,
        extra=f"{extra}beta: f32[B, S, 4]; start: {state}",
    )
    last = torch.zeros(2, 4, 5, 3)
    for piece in (slice(0, 3), slice(3, 3), slice(3, 8)):
        cut = [x[:, piece] for x in tensors]
        actual, last = evaluate(parts, [*cut, *rates, beta[:, piece], last])
        assert torch.equal(actual, y[:, piece])
    assert torch.equal(last, end)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda: graph("delta=true"), "the input beta is missing"),
        (lambda: graph(k="4, 5"), r"q is f32\[B, S, 2, 5\], k is f32\[B, S, 4, 5\]"),
        (lambda: graph(decay="B, S, 3"), r"decay is f32\[B, S, 3\], expected f32\[B, S, 4\]"),
        (
            lambda: graph("rated=true", decay="B, S, 4, 3", extra="rates: f32[5, 3]"),
            r"rates is f32\[5, 3\], expected f32\[4, 5, 3\]",
        ),
        (lambda: graph("delta=true", extra="beta: bf16[B, S, 4]"), r"beta.*is not f32"),
    ],
)
def test_what_the_rule_refuses(broken: object, words: str) -> None:
    with pytest.raises(IRError, match=words):
        verify(broken(), Stage.ATEN)  # type: ignore[operator]
