"""nn.attention, nn.rotary and nn.append: their reference, and the errors of their type rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import IRError
from moec.ir.graph import Graph, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.verifier import verify
from moec.ir.ops.dense.attention import OPERANDS, SWAP, Attention
from moec.ir.text import parse, print_graph

SIZES = "  size B in [0, inf]\n  size S in [0, inf]\n  size L in [0, inf]\n"


def attention(attrs: str, extra: str = "", dtype: str = "f32") -> Graph:
    """q, k, v, and the inputs in `extra`, written ", name: type"."""
    names = "".join(f", {part.split(':')[0].strip()}" for part in extra.split("; ") if part)
    extra = "".join(f", {part}" for part in extra.split("; ") if part)
    return parse(
        f"graph main(q: {dtype}[B, 4, S, 8], k: {dtype}[B, 2, L, 8], v: {dtype}[B, 2, L, 6]"
        f"{extra}) {{\n{SIZES}"
        f"  y: {dtype}[B, 4, S, 6] = nn.attention(q, k, v{names}) <{attrs}>\n  return y\n}}\n"
    )


def inputs(batch: int, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch + 10 * queries + 100 * keys)
    shapes = ((batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6))
    return tuple(torch.randn(shape) for shape in shapes)


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    f = torch.nn.functional.scaled_dot_product_attention
    return f(q, k, v, scale=0.3, **options)  # type: ignore[arg-type]


SIZE = st.integers(1, 9)
LAYOUTS = {
    "q": ("q: f32[B, 4, S, 8]", "q: f32[B, S, 4, 8]"),
    "k": ("k: f32[B, 2, L, 8]", "k: f32[B, L, 2, 8]"),
    "v": ("v: f32[B, 2, L, 6]", "v: f32[B, L, 2, 6]"),
    "out": ("y: f32[B, 4, S, 6]", "y: f32[B, S, 4, 6]"),
}


@given(batch=st.integers(0, 2), queries=SIZE, keys=SIZE, causal=st.booleans())
def test_as_torch(batch: int, queries: int, keys: int, causal: bool) -> None:
    """Also where there are more queries than keys, or fewer: torch counts both from 0."""
    graph = attention(f"scale=0.3, causal={str(causal).lower()}")
    verify(graph, Stage.ATEN)
    q, k, v = inputs(batch, queries, keys)
    want = by_torch(q, k, v, is_causal=causal)
    torch.testing.assert_close(evaluate(graph, [q, k, v])[0], want)


@given(queries=SIZE, keys=SIZE, seed=st.integers(0, 99), floats=st.booleans())
def test_masks_as_torch(queries: int, keys: int, seed: int, floats: bool) -> None:
    """Rows that see nothing included: zeros, as torch gives."""
    torch.manual_seed(seed)
    q, k, v = inputs(2, queries, keys)
    mask = torch.rand(2, 1, queries, keys) < 0.5
    given_mask = torch.where(mask, torch.randn(mask.shape), -torch.inf) if floats else mask
    dtype = "f32" if floats else "bool"
    graph = attention("scale=0.3, masked=true", f"mask: {dtype}[B, 1, S, L]")
    want = by_torch(q, k, v, attn_mask=given_mask)
    torch.testing.assert_close(evaluate(graph, [q, k, v, given_mask])[0], want)


@given(length=SIZE, limit=st.integers(1, 10), kind=st.sampled_from(["window", "chunk"]))
def test_windows_and_chunks(length: int, limit: int, kind: str) -> None:
    q, k, v = inputs(1, length, length)
    at = torch.arange(length)
    near = at > at[:, None] - limit if kind == "window" else at // limit == at[:, None] // limit
    graph = attention(f"scale=0.3, causal=true, {kind}={limit}")
    want = by_torch(q, k, v, attn_mask=near & (at <= at[:, None]))
    torch.testing.assert_close(evaluate(graph, [q, k, v])[0], want)


def test_sinks_are_keys_without_values() -> None:
    """As one more key whose score is the sink and whose value is 0."""
    q, k, v = inputs(2, 3, 5)
    sinks = torch.randn(4)
    graph = attention("scale=0.3, causal=true, sinked=true", "sinks: f32[4]")
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(
        torch.arange(5) > torch.arange(3)[:, None], -torch.inf
    )
    powers = scores.exp()
    shares = powers / (powers.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    want = shares @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(evaluate(graph, [q, k, v, sinks])[0], want)


@given(batch=st.integers(0, 2), queries=SIZE, keys=SIZE, named=st.sets(st.sampled_from(OPERANDS)))
def test_where_tokens_stand(batch: int, queries: int, keys: int, named: set[str]) -> None:
    """Layouts change where the numbers are, and none of them."""
    text = print_graph(attention("scale=0.3, causal=true"))
    for name in named:
        old, new = LAYOUTS[name]
        text = text.replace(old, new)
    layout = ", ".join(f'"{name}"' for name in OPERANDS if name in named)
    graph = parse(text.replace("causal=true", f"causal=true, tokens_first=({layout})"))
    verify(graph, Stage.ATEN)
    given_ = inputs(batch, queries, keys)
    moved = [x.permute(SWAP) if n in named else x for n, x in zip("qkv", given_, strict=True)]
    (y,) = evaluate(graph, moved)
    (want,) = evaluate(attention("scale=0.3, causal=true"), given_)
    assert torch.equal(y.permute(SWAP) if "out" in named else y, want)


def test_float64_stays_so() -> None:
    tensors = [x.double() for x in inputs(1, 3, 3)]
    (y,) = evaluate(attention("scale=0.3", dtype="f64"), tensors)
    torch.testing.assert_close(y, by_torch(*tensors), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "attrs",
    [
        "scale=0.5",
        "scale=0.5, causal=true, window=3",
        "scale=1.0, chunk=8",
        'scale=1.0, tokens_first=("out")',
    ],
)
def test_attributes_round_trip(attrs: str) -> None:
    graph = attention(attrs)
    if "out" in attrs:
        graph = parse(print_graph(graph).replace(*LAYOUTS["out"]))
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)
    (op,) = graph.ops
    assert Attention.of(op).attrs() == dict(op.attrs)
    assert Attention.of(op).inputs == op.inputs


@pytest.mark.parametrize(
    ("attrs", "extra", "change", "reason"),
    [
        ("scale=1", "", ("", ""), "scale is not a float"),
        ("scale=1.0, window=0", "", ("", ""), "window is not a positive int"),
        ("scale=1.0, chunk=true", "", ("", ""), "chunk is not a positive int"),
        (
            'scale=1.0, tokens_first=("v", "q")',
            "",
            ("", ""),
            "tokens_first is not some of q, k, v, out",
        ),
        ("scale=1.0, tokens_first=true", "", ("", ""), "tokens_first is not some of q, k"),
        (
            'scale=1.0, tokens_first=("k")',
            "",
            ("", ""),
            "k is f32[B, 2, L, 8], v is f32[B, 2, L, 6]",
        ),
        ("scale=1.0, masked=true", "", ("", ""), "the input mask is missing"),
        ("scale=1.0, sinked=true", "", ("", ""), "the input sinks is missing"),
        ("scale=1.0", "mask: bool[B, 1, S, L]", ("", ""), "has inputs that no attribute names"),
        (
            "scale=1.0, masked=true",
            "mask: bool[S, L]",
            ("", ""),
            "the mask bool[S, L] is not for (B, 4, S, L)",
        ),
        ("scale=1.0, masked=true", "m: i64[B, 1, S, L]", ("", ""), "the mask is i64[B, 1, S, L]"),
        ("scale=1.0, sinked=true", "sinks: f32[2]", ("", ""), "sinks are not one per head"),
        ("scale=1.0", "", ("k: f32[B, 2,", "k: f32[B, 3,"), "k is f32[B, 3, L, 8], v is f32[B, 2,"),
        ("scale=1.0", "", ("[B, 2,", "[B, 3,"), "4 query heads share 3 key heads"),
        ("scale=1.0", "", ("k: f32[B,", "k: f32[1,"), "k has another batch than q"),
        ("scale=1.0", "", ("v: f32", "v: bf16"), "v is bf16[B, 2, L, 6], q is f32[B, 4, S, 8]"),
        ("scale=1.0", "", ("L, 8]", "L, 9]"), "q f32[B, 4, S, 8] by k f32[B, 2, L, 9]"),
        ("scale=1.0", "", ("q: f32[B, 4, S, 8]", "q: f32[4, S, 8]"), "expected four axes"),
    ],
)
def test_refused(attrs: str, extra: str, change: tuple[str, str], reason: str) -> None:
    text = print_graph(attention(attrs, extra))
    if change[0]:
        text = text.replace(*change)
    with pytest.raises(IRError) as caught:
        verify(parse(text), Stage.ATEN)
    assert reason in str(caught.value)


# ---- nn.rotary -------------------------------------------------------------------------


def rotary(attrs: str = "", width: int = 4) -> Graph:
    return parse(
        f"graph main(x: f32[B, S, 8], cos: f32[1, S, {width}], sin: f32[1, S, {width}]) {{\n"
        "  size B in [0, inf]\n  size S in [0, inf]\n"
        f"  y: f32[B, S, 8] = nn.rotary(x, cos, sin){attrs}\n  return y\n}}\n"
    )


@given(length=st.integers(0, 5), seed=st.integers(0, 99))
def test_neighbours_are_complex_numbers(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, angle = torch.randn(2, length, 8), torch.rand(1, length, 4) * 9
    graph = rotary(' <pairs="neighbours", gives="neighbours">')
    verify(graph, Stage.ATEN)
    turned = torch.view_as_complex(x.reshape(2, length, 4, 2)) * torch.polar(
        torch.ones_like(angle), angle
    )
    want = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(evaluate(graph, [x, angle.cos(), angle.sin()])[0], want)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("gives", ["halves", "neighbours"])
@pytest.mark.parametrize("width", [4, 8])
def test_places_of_pairs(pairs: str, gives: str, width: int) -> None:
    """The layout of pairs only changes the order of features."""
    x = torch.randn(2, 3, 8)
    tables = [torch.randn(1, 3, width) for _ in range(2)]
    evens = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    plain = x[..., evens] if pairs == "neighbours" else x
    want = evaluate(rotary(width=width), [plain, *tables])[0]
    graph = rotary(f' <pairs="{pairs}", gives="{gives}">', width)
    actual = evaluate(graph, [x, *tables])[0]
    assert torch.equal(actual[..., evens] if gives == "neighbours" else actual, want)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("x: f32[B, S, 8]", "x: f32[B, S, 7]"), "no even number of features"),
        (("cos: f32[1, S, 4]", "cos: f32[1, S, 3]"), "cos: f32[1, S, 3] is not for x"),
        (("cos: f32[1, S, 4]", "cos: f32[S, 4]"), "cos: f32[S, 4] is not for x"),
        (("cos: f32[1, S, 4]", "cos: f32[1, S, 8]"), "cos: f32[1, S, 8] and sin: f32[1, S, 4]"),
        (("sin: f32", "sin: i64"), "is not of floats"),
        (('"halves"', '"quarters"'), "pairs is not one of"),
    ],
)
def test_rotary_refused(change: tuple[str, str], reason: str) -> None:
    text = print_graph(rotary(' <pairs="halves">')).replace(*change)
    with pytest.raises(IRError) as caught:
        verify(parse(text), Stage.ATEN)
    assert reason in str(caught.value)


# ---- nn.append -------------------------------------------------------------------------

APPEND = (
    "graph main(cache: f32[B, 2, L, 8], x: f32[B, S, 2, 8], first: i64[B], "
    "cos: f32[B, 1, S, 8], sin: f32[B, 1, S, 8]) {\n" + SIZES + "  y: f32[B, 2, L, 8] = "
    "nn.append(cache, x, first, cos, sin) <turned=true, tokens_first=true>\n  return y\n}\n"
)


@given(length=st.integers(1, 5), spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_turned_where_it_is_written(length: int, spare: int, seed: int) -> None:
    """As permuting, nn.rotary and writing one row after the other."""
    torch.manual_seed(seed)
    graph = parse(APPEND)
    verify(graph, Stage.ATEN)
    cache, x = torch.randn(2, 2, length + spare, 8), torch.randn(2, length, 2, 8)
    first, (cos, sin) = torch.tensor([0, spare]), torch.randn(2, 2, 1, length, 8)
    (actual,) = evaluate(graph, [cache, x, first, cos, sin])
    want, (a, b) = cache.clone(), x.permute(SWAP).chunk(2, -1)
    turned = x.permute(SWAP) * cos + torch.cat([-b, a], -1) * sin
    for text, start in enumerate(first.tolist()):
        want[text, :, start : start + length] = turned[text]
    torch.testing.assert_close(actual, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((", cos, sin) <", ") <"), "the input cos is missing"),
        (("<turned=true, ", "<"), "has inputs that no attribute names"),
        ((", tokens_first=true", ""), "x: f32[B, S, 2, 8] is not for cache: f32[B, 2, L, 8]"),
        (("x: f32", "x: bf16"), "x: bf16[B, S, 2, 8] is not for cache"),
        (("first: i64[B]", "first: i64[S]"), "first: i64[S] is not one place each"),
        (("cos: f32[B, 1, S", "cos: f32[B, S, 1"), "cos: f32[B, S, 1, 8] is not for x"),
    ],
)
def test_append_refused(change: tuple[str, str], reason: str) -> None:
    assert change[0] in APPEND
    with pytest.raises(IRError) as caught:
        verify(parse(APPEND.replace(*change)), Stage.ATEN)
    assert reason in str(caught.value)
