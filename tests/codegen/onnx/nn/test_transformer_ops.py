"""nn.attention, norms and nn.rotary against their reference, fused and as separate ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.codegen.onnx.running import agree, program, running, written

QKV = "q: f32[B, 4, S, 8], k: f32[B, 2, S, 8], v: f32[B, 2, S, 6]"
SIZES = "size B in [1, 8]\n size S in [1, 64]\n"
ATTENTION = {
    "all": ("", "<scale=0.5>"),
    "causal": ("", "<scale=0.5, causal=true>"),
    "window": ("", "<scale=0.5, causal=true, window=3>"),
    "chunk": ("", "<scale=0.5, causal=true, chunk=4>"),
    "bool mask": ("mask: bool[B, 1, S, S]", "<scale=0.5, masked=true>"),
    "causal mask": ("mask: bool[B, 1, 1, S]", "<scale=0.5, causal=true, masked=true>"),
    "mask of heads": ("mask: f32[1, 4, S, S]", "<scale=1.0, masked=true>"),
    "sinks": ("sinks: f32[4]", "<scale=0.5, causal=true, sinked=true>"),
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind: str, opset: int, tmp_path: Path) -> None:
    """Including queries that see no key, which give zeros."""
    extra, attrs = ATTENTION[kind]
    name = extra.split(":")[0]
    changed = program(f"""
    graph main({QKV}{", " + extra if extra else ""}) {{
      {SIZES}
      y: f32[B, 4, S, 6] = nn.attention(q, k, v{", " + name if name else ""}) {attrs}
      return y
    }}""")
    run = running(changed, tmp_path, opset=opset)
    for batch, length in ((1, 1), (2, 7), (3, 13)):
        sizes = {"B": batch, "S": length}
        inputs = [
            torch.randn([d if isinstance(d, int) else sizes[d.name] for d in v.shape])
            for v in changed.graph.inputs
        ]
        if "bool" in extra:
            inputs[3] = inputs[3] > 0
            inputs[3][0, :, 0] = False
        agree(changed, run, inputs)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("limit", ["", ", window=3"])
def test_attention_where_tokens_stand_first(limit: str, opset: int, tmp_path: Path) -> None:
    changed = program(f"""
    graph main(q: f32[B, S, 4, 8], k: f32[B, S, 2, 8], v: f32[B, 2, S, 6]) {{
      {SIZES}
      y: f32[B, S, 4, 6] = nn.attention(q, k, v) \
<scale=0.5, causal=true{limit}, tokens_first=("q", "k", "out")>
      return y
    }}""")
    run = running(changed, tmp_path, opset=opset)
    for length in (1, 7):
        q, k = (torch.randn(2, length, heads, 8) for heads in (4, 2))
        agree(changed, run, [q, k, torch.randn(2, 2, length, 6)])


@pytest.mark.parametrize("opset", [18, 23])
def test_attention_of_other_lengths(opset: int, tmp_path: Path) -> None:
    """Queries and keys both count from 0, so some may see no key of a window."""
    changed = program("""
    graph main(q: f32[B, 2, S, 8], k: f32[B, 2, L, 8], v: f32[B, 2, L, 8]) {
      size B in [1, 8]
      size S in [1, 64]
      size L in [1, 64]
      y: f32[B, 2, S, 8] = nn.attention(q, k, v) <scale=0.5, causal=true, window=2>
      z: f32[B, 2, S, 8] = nn.attention(q, k, v) <scale=0.5, causal=true>
      return y, z
    }""")
    run = running(changed, tmp_path, opset=opset)
    for queries, keys in ((5, 9), (9, 3)):
        q, k, v = (torch.randn(2, 2, n, 8) for n in (queries, keys, keys))
        agree(changed, run, [q, k, v])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("round_first", ["", ", round_first=true"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "f64"])
def test_rms_norm(dtype: str, round_first: str, opset: int, tmp_path: Path) -> None:
    changed = program(f"""
    graph main(x: {dtype}[B, S, 8]; w: {dtype}[8]) {{
      {SIZES}
      y: {dtype}[B, S, 8] = nn.rms_norm(x, w) <epsilon=1e-06{round_first}>
      z: {dtype}[B, S, 8] = nn.rms_norm(x) <epsilon=1e-06>
      return y, z
    }}""")
    kind = {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}[dtype]
    changed.weights["w"] = changed.weights["w"].to(kind)  # type: ignore[index]
    run = running(changed, tmp_path, opset=opset)
    # f16: the last bit of a result may round the other way.
    agree(changed, run, [torch.randn(2, 5, 8).to(kind)], 2e-3 if dtype == "f16" else 1e-5)


@pytest.mark.parametrize("opset", [18, 23])
def test_add_norm(opset: int, tmp_path: Path) -> None:
    changed = program(f"""
    graph main(x: f32[B, S, 8], r: f32[B, S, 8]; w: f32[8], b: f32[8]) {{
      {SIZES}
      h: f32[B, S, 8], y: f32[B, S, 8] = nn.add_norm(x, r, w) <kind="rms", epsilon=1e-6, scale=0.22>
      i: f32[B, S, 8], z: f32[B, S, 8] = nn.add_norm(y, h, w, b) <kind="layer", epsilon=1e-5>
      j: f32[B, S, 8], v: f32[B, S, 8] = nn.add_norm(z, i) <kind="layer", epsilon=1e-5>
      return h, y, i, z, j, v
    }}""")
    run = running(changed, tmp_path, opset=opset)
    agree(changed, run, [torch.randn(2, 5, 8), torch.randn(2, 5, 8)], 1e-5)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("gives", ["halves", "neighbours"])
@pytest.mark.parametrize("width", [8, 4])
def test_rotary(width: int, gives: str, pairs: str, opset: int, tmp_path: Path) -> None:
    """Angles of all features need not repeat: the first half is for a', the second for b'."""
    changed = program(f"""
    graph main(x: f32[B, 2, S, 8], c: f32[1, 1, S, {width}], s: f32[1, 1, S, {width}]) {{
      {SIZES}
      y: f32[B, 2, S, 8] = nn.rotary(x, c, s) <pairs="{pairs}", gives="{gives}">
      return y
    }}""")
    run = running(changed, tmp_path, opset=opset)
    agree(changed, run, [torch.randn(3, 2, 5, 8), *torch.randn(2, 1, 1, 5, width)])


def kinds(text: str, tmp_path: Path, opset: int) -> list[str]:
    return [node.kind for node in written(program(text), tmp_path, opset=opset)[0].nodes()]


def test_the_standard_has_operators_for_them(tmp_path: Path) -> None:
    """Angles that are cat(a, a) are known to repeat."""
    text = f"""
    graph main(x: f32[B, 4, S, 8], a: f32[1, 1, S, 4], w: f32[8]) {{
      {SIZES}
      both: f32[1, 1, S, 8] = aten.cat.default(a, a) <tensors=($0, $1), dim=-1>
      c: f32[1, 1, S, 8] = aten.cos.default(both)
      s: f32[1, 1, S, 8] = aten.sin.default(both)
      n: f32[B, 4, S, 8] = nn.rms_norm(x, w) <epsilon=1e-06>
      q: f32[B, 4, S, 8] = nn.rotary(n, c, s)
      y: f32[B, 4, S, 8] = nn.attention(q, q, n) <scale=0.5, causal=true>
      return y
    }}"""
    fused = {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert fused <= set(kinds(text, tmp_path, 23))
    assert not fused & set(kinds(text, tmp_path, 22))
