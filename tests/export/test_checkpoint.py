"""Checkpoints in few bits: the package compressed-tensors, transformers and moec read one model."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from moec.capture.doors import open_source
from moec.errors import CaptureError, UsageError
from moec.export.checkpoint import convert, parse_conversion
from moec.ir.formats.integer import dequantise, quantise
from moec.ir.formats.notation import parse
from moec.sources.checkpoint.folders import compressed_tensors
from moec.sources.checkpoint.folders.packed_integers import pack_last, unpack_last
from moec.sources.checkpoint.tensors import map_folder
from tests.sources.checkpoint.families import FAMILIES, model

QUANTS = ("int4:32", "int8", "experts=int4:32,linears=int8:32", "experts=int8")


def converted(folder, family, quant, **options):
    """A checkpoint of the family in `folder`/plain, and what `convert` makes of it in `out`."""
    model(family).save_pretrained(folder / "plain")
    result = convert(folder / "plain", folder / "out", parse_conversion(quant), **options)
    return result, folder / "out"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [8, 13])
def test_packing_is_undone_by_unpacking(bits, width):
    integers = torch.randint(2**bits, (5, width), dtype=torch.uint8)
    words = pack_last(integers, bits)
    assert words.shape == (5, -(-width * bits // 32))
    assert torch.equal(unpack_last(words, bits)[:, :width], integers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_the_package_reads_the_values(family, quant, tmp_path):
    """A matrix that was rounded has the values of moec's codes, exactly; others are unchanged."""
    result, out = converted(tmp_path, family, quant)
    formats = parse_conversion(quant)
    plan = QuantizationConfig(
        **json.loads((out / "config.json").read_text())["quantization_config"]
    )
    source = load_file(tmp_path / "plain/model.safetensors")
    tensors = load_file(out / "model.safetensors")
    read = compressed_tensors.read({}, map_folder(out))
    assert read.keys() == source.keys()
    compressor = BaseCompressor.get_value_from_registry(plan.format)
    count = 0
    for name, weight in source.items():
        if name in tensors:
            assert torch.equal(tensors[name], weight)
            continue
        format = formats.experts if ".experts." in name else formats.linears
        [scheme] = [s for s in plan.config_groups.values() if s.weights.num_bits == format.bits]
        stored = {
            part: tensors[f"{name}_{part.removeprefix('weight_')}"]
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        stored["weight_scale"] = stored["weight_scale"].float()
        parts = quantise(format, weight[None])
        values = dequantise(format.kind, parts.codes, parts.scales)[0]
        assert torch.equal(compressor.decompress(stored, scheme)["weight"], values)
        codes, width = read[name].codes, weight.shape[1]
        assert codes.format.kind == format.kind
        assert codes.format.blocks(width) == format.blocks(width)
        assert torch.equal(codes.read().codes, parts.codes[0])
        assert torch.equal(codes.read().scales, parts.scales[0])
        count += 1
    assert count == sum(result.formats.values())
    assert not any("gate.weight_" in name or "embed_tokens.weight_" in name for name in tensors)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["int4:32", "experts=int4:32,linears=int8"])
def test_transformers_and_moec_load_the_same_model(family, quant, tmp_path):
    _, out = converted(tmp_path, family, quant, largest=60_000)
    source = open_source(out)
    assert not source.codes().nearest
    stored = source.codes().stored
    assert {"mlp.experts.down_proj", "self_attn.o_proj.weight"} <= {
        name.removeprefix("model.layers.1.") for name in stored
    }
    expected = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    read = source.model.state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_a_stack_of_experts_is_written_one_by_one(tmp_path):
    _, out = converted(tmp_path, "qwen3_moe", "int4:32")
    state = model("qwen3_moe").state_dict()
    assert state["model.layers.0.mlp.experts.down_proj"].ndim == 3
    save_file(state, tmp_path / "plain/model.safetensors", {"format": "pt"})
    convert(tmp_path / "plain", tmp_path / "of_stack", parse_conversion("int4:32"))
    expected, tensors = (
        load_file(folder / "model.safetensors") for folder in (out, tmp_path / "of_stack")
    )
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_stack_without_names_for_experts_is_refused(tmp_path):
    words = r"experts.down_proj is a stack of 4 experts, for which .*GptOssForCausalLM has no names"
    with pytest.raises(CaptureError, match=words):
        converted(tmp_path, "gpt_oss", "int4:32")
    result = convert(tmp_path / "plain", tmp_path / "out", parse_conversion("linears=int8"))
    assert result.formats == {"linears int8": 8}
    assert open_source(tmp_path / "out").codes().stored


def test_a_quantised_checkpoint_is_quantised_again(tmp_path):
    """int8 to int4: rounded values of the rounded values, and no trace of the first."""
    _, first = converted(tmp_path, "qwen3_moe", "int8")
    convert(first, tmp_path / "second", parse_conversion("experts=int4:32"))
    tensors = load_file(tmp_path / "second/model.safetensors")
    of_first = compressed_tensors.read({}, map_folder(first))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    parts = quantise(parse("int4:32"), of_first[name].values()[None])
    assert torch.equal(tensors[f"{name}_scale"], parts.scales[0])
    assert torch.equal(unpack_last(tensors[f"{name}_packed"], 4), parts.codes[0])
    linear = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(tensors[linear], of_first[linear].values().bfloat16())


def test_shards_have_an_index_and_aligned_tensors(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "moec")
    result, out = converted(tmp_path, "mixtral", "int4:32", largest=60_000)
    paths = sorted(out.glob("*.safetensors"))
    assert [path.name for path in paths] == [
        f"model-{i + 1:05}-of-{result.files:05}.safetensors" for i in range(result.files)
    ]
    assert all(path.stat().st_size < 70_000 for path in paths)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {name: path.name for path in paths for name in load_file(path)}
    assert index["weight_map"] == tensors
    total = sum(tensor.nbytes for path in paths for tensor in load_file(path).values())
    assert index["metadata"]["total_size"] == total
    shares = [record.share for record in caplog.records if hasattr(record, "share")]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > result.files


def test_a_failure_leaves_nothing(tmp_path):
    words = "blocks of 64 do not divide: choose smaller blocks or none for experts"
    with pytest.raises(UsageError, match=words):
        converted(tmp_path, "mixtral", "experts=int4:64")

    def interrupt(phase):
        if phase.startswith("write 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, "mixtral", "int4:32", largest=60_000, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
