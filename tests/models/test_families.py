"""One compiled model of each family equals eager at every size, and names its blocks."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import moec
from moec.export.kv_cache import CachedTexts
from moec.export.onnx import open_session, runner
from moec.ir.interpret.run_in_float32 import eager_in_float32
from moec.ir.text import print_graph
from moec.oracle.rounding import NOISE, UNIT, errors_of_rows, rows_beyond
from moec.oracle.tolerance import EXACT_ROWS, TOLERANCES, distance
from moec.passes.decode import with_past_inputs
from tests.models.captured import captured_program
from tests.models.families import SMALL
from tests.once import Once

SIZES = ((1, 1), (1, 7), (2, 33), (4, 128))
BLOCKS = {
    "mixtral": (1, 4, 2, "softmax, top-2, renormalised", "swiglu"),
    "qwen2_moe": (1, 8, 2, "softmax, top-2", "swiglu"),
    "qwen3_moe": (1, 8, 2, "softmax, top-2, renormalised", "swiglu"),
    "olmoe": (1, 8, 2, "softmax, top-2", "swiglu"),
    "deepseek_v2": (1, 8, 2, "softmax, top-2", "swiglu"),
    "deepseek_v3": (1, 8, 2, "sigmoid, correction bias, best 2 of 4 groups", "swiglu"),
    "gpt_oss": (2, 4, 2, "top-2, softmax", "clamped swiglu"),
    "granitemoe": (1, 8, 2, "top-2, softmax", "swiglu"),
    "phimoe": (1, 4, 2, "sparsemixer, top-2", "swiglu"),
    "switch_transformers": (2, 4, 1, "", "relu"),
    "jetmoe": (3, 4, 2, "top-2, softmax", ""),
    "llama4": (1, 4, 1, "top-1, sigmoid, weights on the input", "swiglu"),
}
"""Blocks, experts, top_k, how the router's description starts, activation."""


def tensors(inputs: dict[str, object]) -> list[torch.Tensor]:
    return [value for value in inputs.values() if isinstance(value, torch.Tensor)]


def compiled(name: str, dtype: torch.dtype, size: tuple[int, int]) -> moec.CompiledModel:
    """The family, from an example of `size` texts and tokens."""
    family = SMALL[name]
    return moec.compile(family.build(dtype), (), family.inputs(*size))


def results(model: object, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    module = model(*inputs)  # type: ignore[operator]
    return list(module.values()) if isinstance(module, dict) else [module]


def same_choice(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> torch.Tensor:
    """For each row, whether the arg-max agrees, or eager's two best are too near to tell."""
    best = expected.double().topk(2, dim=-1)
    near = best.values[..., 0] - best.values[..., 1] <= limit * expected.double().abs().max()
    return near | (actual.argmax(-1) == best.indices[..., 0])


@pytest.mark.parametrize("name", SMALL)
def test_float32(name: str, tmp_path: Path, once: Once) -> None:
    """From one text, whose graph is that of two."""
    model = compiled(name, torch.float32, (1, 8))
    assert [note for note in model.captured.fixed if "drawn masks" not in note] == []
    graph = captured_program(name, once).graph
    assert print_graph(model.captured.program.graph) == print_graph(graph)
    limit = TOLERANCES["f32"]
    count, experts, top_k, router, activation = BLOCKS[name]
    assert len(model.blocks) == count
    for block in model.blocks:
        assert (block.experts, block.top_k) == (experts, top_k)
        assert block.router.startswith(router)
        assert not activation or block.activation == activation
        assert block.kernel
    model.save(tmp_path / "model.moec")
    loaded = moec.load(tmp_path / "model.moec")
    for batch, sequence in SIZES:
        inputs = tensors(SMALL[name].inputs(batch, sequence))
        expected = model.captured.eager(*inputs)
        for actual, again, value in zip(
            results(model, inputs), results(loaded, inputs), expected, strict=True
        ):
            assert distance(actual, value) <= limit
            assert same_choice(actual, value, limit).all()
            assert torch.equal(actual, again)
    exported(name, model, tmp_path)
    if name in TIER_1:
        exported_in_few_bits(name, model, tmp_path)
    if name != "switch_transformers":  # its decoder also reads an encoder
        exported_with_a_cache(name, model, tmp_path)


TIER_1 = tuple(name for name in BLOCKS if name not in ("switch_transformers", "jetmoe", "llama4"))
OPERATOR = ("mixtral", "qwen2_moe", "deepseek_v3", "phimoe")


def exported(name: str, model: moec.CompiledModel, folder: Path) -> None:
    """An ONNX file for each ep, some with com.microsoft.MoE, gives eager's numbers too."""
    kinds = [("cpu", "auto"), ("portable", "auto")] + [("cpu", "op")] * (name in OPERATOR)
    for ep, moe in kinds:
        path = folder / f"{ep}-{moe}.onnx"
        exported = model.export_onnx(path, ep, moe=moe, cache=False)
        assert set(exported.parity.values()) == {1.0}
        if name != "jetmoe":  # there a block is two: its rows are sorted once
            assert (
                list(exported.forms.values()) == ["op" if moe == "op" else "rows"] * BLOCKS[name][0]
            )
        open_file = runner(open_session(path))
        names = [value.name for value in model.graph.inputs]
        for batch, sequence in SIZES:
            inputs = tensors(SMALL[name].inputs(batch, sequence))
            results = open_file(dict(zip(names, inputs, strict=True))).values()
            for actual, value in zip(results, model.captured.eager(*inputs), strict=True):
                assert distance(actual, value) <= TOLERANCES["f32"]


def exported_in_few_bits(name: str, model: moec.CompiledModel, folder: Path) -> None:
    """int8 and int4 for each ep: the door compares with the quantised weights in float32."""
    for text in ("int8", "int4"):
        for ep in ("cpu", "portable"):
            exported = model.export_onnx(folder / "few.onnx", ep, text, cache=False)
            assert exported.quant == text
            assert set(exported.forms.values()) == {"op" if ep == "cpu" else "rows"}
            assert 0 < max(exported.errors.values()) <= exported.tolerance == EXACT_ROWS
            assert 0 < exported.moved[0].error < (0.03 if text == "int8" else 0.3)


def exported_with_a_cache(name: str, model: moec.CompiledModel, folder: Path) -> None:
    """A prompt and then token by token gives eager's numbers for the whole text; a file for CUDA
    is valid, with all its shapes."""
    path, limit = folder / "cache.onnx", TOLERANCES["f32"]
    exported = model.export_onnx(path, "cuda", cache=True)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    exported = model.export_onnx(path, "portable", cache=True)
    layers = SMALL[name].fields.get("num_hidden_layers", 2)
    assert (exported.caches, set(exported.parity.values())) == (layers, {1.0})
    texts = CachedTexts(
        with_past_inputs(model.pass_results[-1].program), runner(open_session(path)), 2
    )
    (ids,) = tensors(SMALL[name].inputs(2, 20))
    pieces = [texts.feed(piece) for piece in ids.split([12, *[1] * 8], 1)]
    (expected,) = model.captured.eager(ids)
    assert distance(torch.cat(pieces, 1), expected) <= limit


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bfloat16(name: str) -> None:
    """At sizes that no verification tries, near ties included: a row may be as far off as eager's
    with other roundings."""
    model = compiled(name, torch.bfloat16, (2, 7))
    exact = eager_in_float32(model.captured.eager)
    samples = [model.captured.eager]
    samples += [eager_in_float32(samples[0], UNIT["bf16"] * NOISE, seed) for seed in range(32)]
    for size in SIZES[:3]:
        inputs = tensors(SMALL[name].inputs(*size))
        right = [exact(*inputs)[:1]]
        moved = torch.stack([errors_of_rows([s(*inputs)], right)[0] for s in samples[:2]])
        limit = 3 * float(moved.quantile(0.9))
        beyond = rows_beyond([results(model, inputs)[:1]], right, limit)
        for sample in samples if beyond else ():
            beyond = beyond and beyond.explained_by([sample(*inputs)])
        assert beyond is None
