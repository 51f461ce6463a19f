"""Weights stay in the codes of their checkpoint: the same integers, scales and bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moec
from moec.capture.doors import open_source
from moec.ir.formats.integer import dequantise
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS, matrices_of
from moec.sources.checkpoint.folders import fp8
from moec.sources.checkpoint.tensors import map_folder
from tests.sources.checkpoint import writers
from tests.sources.checkpoint.families import FAMILIES, model
from tests.sources.checkpoint.test_oracles import compressed, write_mxfp4
from tests.sources.checkpoint.test_values import FORMS

EXACT = ("gptq", "gptq-asymmetric", "gptq-v2", "gptq-8", "gptq-rows", "awq", "bnb-int8")
EXACT_SCHEMES = ("int4-group", "int4-asymmetric", "int8-channel", "w8a8")
STORED = (
    *("qweight", "qzeros", "scales"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight", "SCB"),
)


def form(name):
    return FORMS[name] if name in FORMS else compressed(name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*EXACT, *EXACT_SCHEMES])
def test_the_same_values_and_bytes(name, family, tmp_path):
    folder = writers.write(model(family), tmp_path, *form(name))
    source = open_source(folder)
    arranged = source.codes()
    assert not arranged.nearest
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected = plain.state_dict()
    size = count = 0
    for weight, stored in arranged.stored.items():
        parts, width = stored.parts, expected[weight].shape[-1]
        values = dequantise(stored.format.kind, parts.codes, parts.scales, parts.zeros)
        assert torch.equal(values, expected[weight]), weight
        size += stored.format.nbytes(values.numel() // width, width)
        count += values.numel()
    tensors = load_file(folder / "model.safetensors")
    layers = {
        n.rpartition(".")[0] for n in tensors if n.endswith(("qweight", "weight_scale", "SCB"))
    }
    held = [
        tensor.nbytes
        for n, tensor in tensors.items()
        if n.rpartition(".")[0] in layers and n.endswith(STORED)
    ]
    assert size == pytest.approx(sum(held), rel=0.03)
    original = load_file(tmp_path / "plain/model.safetensors")
    assert count == sum(original[f"{layer}.weight"].numel() for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-rows", "fp8-blocks"])
def test_the_same_values_of_fp8(name, family, tmp_path):
    """The same codes. Scales of tensors and of blocks are repeated for each row: beside rows of
    thousands of weights, other than these, they are small."""
    folder = writers.write(model(family), tmp_path, *FORMS[name])
    arranged = open_source(folder).codes()
    assert not arranged.nearest
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected = plain.state_dict()
    for weight, stored in arranged.stored.items():
        assert (stored.format.kind, stored.format.scales) == ("fp8", "f32")
        values = dequantise("fp8", stored.parts.codes, stored.parts.scales)
        assert torch.equal(values, expected[weight]), weight
    tensors = load_file(folder / "model.safetensors")
    held = sum(t.numel() for t in tensors.values() if t.dtype == torch.float8_e4m3fn)
    assert sum(stored.parts.codes.numel() for stored in arranged.stored.values()) == held


def test_blocks_that_a_row_cuts(tmp_path):
    """Of 64 x 64 weights, of which the last ones have 16 rows and 32 columns."""
    tensors = {
        "w.weight": torch.randn(80, 96).to(torch.float8_e4m3fn),
        "w.weight_scale_inv": torch.rand(2, 2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weight = fp8.read({"weight_block_size": [64, 64]}, map_folder(tmp_path))["w.weight"]
    assert str(weight.codes.format) == "fp8:32:f32"
    scale = tensors["w.weight_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(weight.values(), tensors["w.weight"].float() * scale[:80, :96])


def formats(compiled):
    ops = [op for op in compiled.pass_results[-1].program.graph.ops if op.name in QUANTISED_OPS]
    return [str(stored.format) for op in ops for stored in matrices_of(op)]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gptq-asymmetric", "qwen3_moe"),
        ("w8a8", "deepseek_v3"),
        ("mxfp4", "gpt_oss"),
        ("fp8-blocks", "deepseek_v3"),
    ],
)
def test_logits(name, family, tmp_path):
    """The compiled codes against eager with the dequantised float32 weights, and rows of 16 bits,
    which round to 2^-16: what remains is the bfloat16 of activations."""
    if name == "mxfp4":
        folder = write_mxfp4(tmp_path)
    else:
        folder = writers.write(model(family), tmp_path, *form(name))
    compiled = moec.compile(folder, quant="checkpoint:rows16")
    assert "keep the codes of the checkpoint" in str(compiled.report())
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    tokens = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = eager(tokens).logits
        in_16_bits = eager.bfloat16()(tokens).logits.float()
    off = (compiled(tokens).float() - expected).norm() / expected.norm()
    assert off < 1.5 * (in_16_bits - expected).norm() / expected.norm() + 1e-3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gptq-act-order", "weights are rounded to int8:32: act-order"),
        ("nf4-nested", "weights are rounded to int8:32: kernels multiply integers, and nf4 is a"),
        ("fp8-e5m2", "weights are rounded to int8:64: kernels read no e5m2"),
    ],
)
def test_the_nearest_format(name, words, tmp_path):
    folder = writers.write(model("mixtral"), tmp_path, *FORMS[name])
    compiled = moec.compile(folder, build=False)
    assert words in str(compiled.report())
    # half a step of 8 bits, relative to the greatest of a block
    assert max(line.error for line in compiled.quantised) < 0.01


def test_dequantised(tmp_path):
    folder = writers.write(model("mixtral"), tmp_path, *FORMS["gptq"])
    compiled = moec.compile(folder, build=False, quant="none")
    assert not formats(compiled)
    compiled = moec.compile(folder, build=False, quant="int8:32")
    assert set(formats(compiled)) == {"int8:32"}
