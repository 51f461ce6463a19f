"""Checkpoints that do not cover their model, or are damaged: one sentence, with the name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.capture.doors import open_source
from moec.errors import CaptureError
from tests.sources.checkpoint import writers
from tests.sources.checkpoint.families import model
from tests.sources.checkpoint.test_oracles import compressed
from tests.sources.checkpoint.test_values import FORMS

Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
LAYER = "model.layers.0.block_sparse_moe.experts"
W1 = f"{LAYER}.2.w1"


@pytest.fixture(scope="module", params=["gptq", "awq", "fp8-blocks"])
def written(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, writers.write(model("mixtral"), folder, *FORMS[request.param])


def damaged(folder: Path, to: Path, damage: Damage) -> Path:
    """A copy of a folder with other tensors and another configuration."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


def refusal(folder: Path) -> str:
    with pytest.raises(CaptureError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(*names: str) -> Damage:
    def damage(tensors, config):
        for name in list(tensors):
            if name.startswith(names):
                del tensors[name]

    return damage


def test_an_expert_is_missing(written, tmp_path):
    folder = damaged(written[1], tmp_path / "damaged", without(f"{LAYER}.2."))
    assert f"the checkpoint lacks {LAYER}.2.w1.weight, which other experts have" in refusal(folder)


def test_a_weight_of_an_expert_is_missing(written, tmp_path):
    folder = damaged(written[1], tmp_path / "damaged", without(f"{LAYER}.3.w2"))
    assert f"lacks {LAYER}.3.w2.weight" in refusal(folder)


def test_the_last_expert_is_missing_everywhere(written, tmp_path):
    folder = damaged(written[1], tmp_path / "damaged", without(f"{LAYER}.3."))
    assert "experts.down_proj is [3, 64, 96], and config.json makes it [4, 64, 96]" in refusal(
        folder
    )


def test_a_layer_is_missing(written, tmp_path):
    folder = damaged(written[1], tmp_path / "damaged", without("model.layers.1.self_attn.o_proj"))
    assert "lacks the weight model.layers.1.self_attn.o_proj.weight: config.json is" in refusal(
        folder
    )


def test_nothing_reads_a_tensor(written, tmp_path):
    def damage(tensors, config):
        tensors["model.layers.0.extra.weight"] = torch.ones(2)

    folder = damaged(written[1], tmp_path / "damaged", damage)
    assert "holds model.layers.0.extra.weight, which no weight of the model reads" in refusal(
        folder
    )


def test_scales_are_missing(written, tmp_path):
    form, folder = written
    part = "weight_scale_inv" if form == "fp8-blocks" else "scales"
    folder = damaged(folder, tmp_path / "damaged", without(f"{W1}.{part}"))
    assert f"{W1}.{part}" in refusal(folder)


def test_scales_have_another_shape(written, tmp_path):
    form, folder = written
    name = f"{W1}.weight_scale_inv" if form == "fp8-blocks" else f"{W1}.scales"

    def damage(tensors, config):
        tensors[name] = tensors[name][:, :1].repeat(1, 5)

    assert name in refusal(damaged(folder, tmp_path / "damaged", damage))


def test_the_configuration_says_nothing(written, tmp_path):
    def damage(tensors, config):
        del config["quantization_config"]

    message = refusal(damaged(written[1], tmp_path / "damaged", damage))
    assert "config.json has no quantization_config" in message


CONFIGURATIONS = [
    ({"quant_method": "gptqq"}, "quant_method 'gptqq' are not supported; did you mean 'gptq'?"),
    ({"quant_method": "aqlm"}, "quant_method 'aqlm' are not supported"),
    ({"load_in_4bit": False}, "quant_method '' are not supported"),
    ([4], "quantization_config is a list, no object"),
    ({"quant_method": "gptq", "bits": 3}, "bits is 3; moec reads 2, 4, 8"),
    ({"quant_method": "gptq", "bits": "4"}, "bits is '4'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "groups of 48 do not divide rows"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 2**60}, "do not divide rows of 64"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
    ({"quant_method": "fp8", "weight_block_size": [0, 3]}, "weight_block_size is [0, 3]"),
]


@pytest.mark.parametrize(("quantization", "words"), CONFIGURATIONS)
def test_configurations(quantization, words, tmp_path):
    source = writers.write(model("mixtral"), tmp_path, *FORMS["gptq"])

    def damage(tensors, config):
        config["quantization_config"] = quantization

    assert words in refusal(damaged(source, tmp_path / "damaged", damage))


def test_sym_is_said_and_zeros_are_others(tmp_path):
    quantization, writer = FORMS["gptq-asymmetric"]
    source = writers.write(model("mixtral"), tmp_path, quantization | {"sym": True}, writer)
    assert "quantization_config says sym, and model.layers" in refusal(source)


def test_scales_of_another_dtype(written, tmp_path):
    form, folder = written
    name = f"{W1}.weight_scale_inv" if form == "fp8-blocks" else f"{W1}.scales"

    def damage(tensors, config):
        tensors[name] = tensors[name].int()

    assert f"{name} is of int32, and its format makes it float16 or bfloat16 or float32" in refusal(
        damaged(folder, tmp_path / "damaged", damage)
    )


def test_zeros_and_orders_that_the_configuration_says_are_there(tmp_path):
    source = writers.write(model("mixtral"), tmp_path / "a", *FORMS["gptq-act-order"])
    folder = damaged(source, tmp_path / "x", without(f"{W1}.g_idx"))
    assert f"says desc_act, and {W1}.qweight has no {W1}.g_idx" in refusal(folder)
    source = writers.write(model("mixtral"), tmp_path / "b", *compressed("int4-asymmetric"))
    folder = damaged(source, tmp_path / "y", without(f"{W1}.weight_zero_point"))
    assert f"says symmetric: false, and {W1}.weight has no zero points" in refusal(folder)


def test_integers_that_no_configuration_explains(tmp_path):
    source = writers.write(model("mixtral"), tmp_path, *FORMS["gptq"])

    def damage(tensors, config):
        norm = "model.norm.weight"
        tensors[norm] = tensors[norm].to(torch.int8)

    message = refusal(damaged(source, tmp_path / "damaged", damage))
    assert "the weight model.norm.weight is of int8, and config.json names no quant" in message


STATES = [
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 2', "is damaged, or no nf4 or fp4 of"),
    (b'{"quant_type": "nf4", "blocksize": 0, "shape": [96, 64]}', "is damaged, or no nf4 or fp4"),
    (b'{"quant_type": "fp4", "blocksize": 64, "shape": [96, 64]}', "is damaged, or no nf4 or fp4"),
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [1e9, 64]}', "is damaged, or no nf4 or"),
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 128]}', "its weight makes it [192]"),
    (b'{"quant_type": "nf4", "blocksize": 32, "shape": [96, 64]}', "and its weight makes it [192]"),
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 64], "nested_blocksize": 256, '
     b'"nested_offset": 0.5}', f"{W1}.weight.nested_absmax next to it"),
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [96, 64], "nested_blocksize": 256, '
     b'"nested_offset": NaN}', "is damaged, or no nf4 or fp4"),
    (b"\xff", "is damaged, or no nf4 or fp4"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "words"), STATES)
def test_states_of_four_bits(state, words, tmp_path):
    source = writers.write(model("mixtral"), tmp_path, *FORMS["nf4"])

    def damage(tensors, config):
        name = f"{W1}.weight.quant_state.bitsandbytes__nf4"
        tensors[name] = torch.tensor(list(state), dtype=torch.uint8)

    assert words in refusal(damaged(source, tmp_path / "damaged", damage))


def test_parts_of_bitsandbytes(tmp_path):
    four = writers.write(model("mixtral"), tmp_path / "four", *FORMS["nf4"])
    folder = damaged(four, tmp_path / "a", without(f"{W1}.weight.quant_state"))
    assert f"the packed weight {W1}.weight has no {W1}.weight.quant_state" in refusal(folder)
    eight = writers.write(model("mixtral"), tmp_path / "eight", *FORMS["bnb-int8"])
    folder = damaged(eight, tmp_path / "b", without(f"{W1}.SCB"))
    assert f"the integers {W1}.weight have no {W1}.SCB" in refusal(folder)

    def damage(tensors, config):
        tensors[f"{W1}.weight_format"] += 1

    words = f"{W1}.weight_format says that {W1}.weight is not stored by rows"
    assert words in refusal(damaged(eight, tmp_path / "c", damage))


@pytest.mark.parametrize("group", [2**30, "first that is missing", -1])
def test_groups_that_do_not_exist(tmp_path, group):
    source = writers.write(model("mixtral"), tmp_path, *FORMS["gptq-act-order"])

    def damage(tensors, config):
        missing = len(tensors[f"{W1}.scales"])
        tensors[f"{W1}.g_idx"][5] = missing if isinstance(group, str) else group

    assert f"{W1}.g_idx names groups that {W1}.scales does not have" in refusal(
        damaged(source, tmp_path / "damaged", damage)
    )


HEADERS = [
    ({"shape": [2**60, 2], "dtype": "F32", "data_offsets": [0, 8]}, "the bytes of its shape"),
    ({"shape": [2], "dtype": "F32", "data_offsets": [8, 0]}, "truncated or damaged"),
    ({"shape": [-2], "dtype": "F32", "data_offsets": [0, 8]}, "the bytes of its shape"),
    ({"shape": [2], "dtype": "F4", "data_offsets": [0, 8]}, "of dtype 'F4', unknown to moec"),
    ({"shape": "2", "dtype": "F32", "data_offsets": [0, 8]}, "the bytes of its shape"),
    ({"shape": [2], "dtype": [], "data_offsets": [0, 8]}, "the bytes of its shape"),
]


def test_tensors_that_share_bytes_and_names_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    entry = {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}
    for names, words in (
        (["a", "b"], "truncated or damaged"),
        (["a\nb"], r"a tensor 'a\nb', which"),
    ):
        header = json.dumps(dict.fromkeys(names, entry)).encode()
        content = len(header).to_bytes(8, "little") + header + b"\0" * 8
        (tmp_path / "model.safetensors").write_bytes(content)
        assert words in refusal(tmp_path)


@pytest.mark.parametrize(("entry", "words"), HEADERS)
def test_headers(entry, words, tmp_path):
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 8
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert words in refusal(tmp_path)


def test_a_small_file_with_the_configuration_of_a_large_model(tmp_path):
    save_file({"model.norm.weight": torch.ones(4096)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert "config.json makes a model of 46,702,792,832 numbers, and the weights" in refusal(
        tmp_path
    )
