"""ONNX files with past keys and values as inputs: inputs and outputs, padding, the comparison
before a file is named, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.codegen.onnx.lower import BUILD  # with all builders registered
from moec.errors import UnsupportedError, VerificationError
from moec.export.kv_cache import CachedTexts
from moec.export.onnx import open_session, runner
from moec.passes.decode import with_past_inputs
from tests.passes.forms.loops import Loop
from tests.passes.forms.sizes import D

VOCABULARY, HEADS, LONGEST = 40, 4, 64
NEAR = 1e-5  # of the greatest logit: float32 sums in another order, over two layers


class Layer(nn.Module):
    """Attention in which two query heads share one of keys and values, then a loop over experts."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, D)
        self.moe = Loop()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, HEADS // 2, -1).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        x = x + y.transpose(1, 2).reshape(x.shape)
        return x + self.moe(x.reshape(-1, D)).view(x.shape)


class Language(nn.Module):
    def __init__(self, causal: bool = True, hidden: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, D), nn.Embedding(LONGEST, D)
        self.layers = nn.ModuleList(Layer(causal) for _ in range(2))
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.hidden = hidden

    def forward(self, input_ids: Tensor) -> Tensor | dict[str, Tensor]:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return {"hidden": x, "logits": self.head(x)} if self.hidden else self.head(x)


def compiled(**options: bool) -> moec.CompiledModel:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 7))
    return moec.compile(Language(**options).eval(), (ids,), build=False)


@pytest.fixture(scope="module")
def language() -> moec.CompiledModel:
    return compiled()


def test_the_names_and_shapes(language: moec.CompiledModel, tmp_path: Path) -> None:
    exported = language.export_onnx(tmp_path / "model.onnx", "portable")
    assert exported.caches == 2
    assert set(exported.errors) == {"output", "output in pieces"}
    assert max(exported.errors.values()) <= NEAR
    assert set(exported.parity.values()) == {1.0}
    model = onnx.load(tmp_path / "model.onnx")
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {p.key: p.value for p in model.metadata_props}["moec.caches"] == "2"

    def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    past = ["B", HEADS // 2, "past", D // HEADS]
    present = ["B", HEADS // 2, "S + past", D // HEADS]
    positions = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert shapes(model.graph.input) == {
        "input_ids": ["B", "S"],
        "attention_mask": ["B", "S + past"],
        **{f"past_key_values.{position}": past for position in positions},
    }
    assert shapes(model.graph.output) == {
        "output": ["B", "S", VOCABULARY],
        **{f"present.{position}": present for position in positions},
    }


# Rows of slots, by piece; 0 is padding, and 1 a token.
PADDED = {
    "left": ([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], [[1], [1], [1]], [[1], [1], [1]]),
    "right": ([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], [[1], [1], [1]], [[1], [1], [1]]),
    "amid": ([[1, 1, 1], [0, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 0, 1], [1, 1, 0]], [[1], [0], [1]]),
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("ep", ["cpu", "portable"])
def test_texts_of_unequal_lengths(
    language: moec.CompiledModel, ep: str, opset: int, tmp_path: Path
) -> None:
    """Every token's logits are those of its text alone, whatever pads it, and wherever."""
    path = tmp_path / "model.onnx"
    language.export_onnx(path, ep, opset=opset, cache=True)
    run = runner(open_session(path))
    for pieces in PADDED.values():
        texts = CachedTexts(with_past_inputs(language.pass_results[-1].program), run, 3)
        masks = [torch.tensor(piece) for piece in pieces]
        ids = [torch.randint(VOCABULARY, mask.shape) for mask in masks]
        actual = torch.cat([texts.feed(i, m) for i, m in zip(ids, masks, strict=True)], 1)
        assert actual.isfinite().all()
        for row, text, entry in zip(
            actual, torch.cat(ids, 1), torch.cat(masks, 1).bool(), strict=True
        ):
            (expected,) = language.captured.eager(text[entry][None])
            assert (row[entry] - expected[0]).abs().max() <= NEAR * expected.abs().max()


def test_a_file_that_is_wrong_for_padding_alone(
    language: moec.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right at once, and in pieces that all have the same length."""
    monkeypatch.setitem(BUILD, "aten.logical_and.default", lambda c: c.read(c["other"]))
    with pytest.raises(VerificationError, match="in ONNX Runtime output in pieces differs from"):
        language.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_and_what_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 7))
    model = moec.compile(Language(hidden=True).half().eval(), (ids,), build=False)
    exported = model.export_onnx(tmp_path / "model.onnx")
    assert exported.notes == ("with a cache the file gives logits, and not hidden",)
    assert set(exported.errors) == {"logits", "logits in pieces"}
    assert max(exported.errors.values()) <= exported.tolerance < 1e-2
    past = onnx.load(tmp_path / "model.onnx").graph.input[2]
    assert past.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_without_a_cache(language: moec.CompiledModel, tmp_path: Path) -> None:
    exported = language.export_onnx(tmp_path / "model.onnx", cache=False)
    assert (exported.caches, exported.notes, set(exported.errors)) == (0, (), {"output"})
    assert [v.name for v in onnx.load(tmp_path / "model.onnx").graph.input] == ["input_ids"]


def test_what_cannot_have_one(tmp_path: Path) -> None:
    """If requested, it is refused; otherwise the report gives the reason why there is no cache."""
    model = compiled(causal=False)
    why = "the attention at layers.0 is not causal"
    with pytest.raises(UnsupportedError) as refused:
        model.export_onnx(tmp_path / "model.onnx", cache=True)
    assert str(refused.value) == (
        f"Language cannot be exported with a cache: {why}; export its whole forward with "
        "cache=False (--no-cache)"
    )
    assert not list(tmp_path.iterdir())
    exported = model.export_onnx(tmp_path / "model.onnx")
    assert (exported.caches, exported.notes) == (0, (f"without a cache of keys and values: {why}",))


def test_a_model_without_text(tmp_path: Path) -> None:
    model = moec.compile(nn.Linear(D, D), (torch.randn(5, D),), build=False)
    with pytest.raises(UnsupportedError, match=r"a cache: the model returns no logits \[B, S, V\]"):
        model.export_onnx(tmp_path / "model.onnx", cache=True)
    assert model.export_onnx(tmp_path / "model.onnx").notes == ()
