"""Formats whose own package runs here: its reader is the oracle, its writer the source of files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moec.capture.doors import open_source
from moec.ir.formats.integer import quantise
from moec.ir.formats.notation import Format
from tests.sources.checkpoint import writers
from tests.sources.checkpoint.families import FAMILIES, model

SCHEMES = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, 32),
    "int4-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        32,
    ),
    "int8-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, 0),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, 0),
    "fp8-channel": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        0,
    ),
}


def compressed(scheme):
    """A writer that lets the package compress, and its own values of what it stored."""
    import compressed_tensors as package
    from compressed_tensors.compressors.base import BaseCompressor

    form, arguments, group = SCHEMES[scheme]
    quantization = package.quantization
    weights = quantization.QuantizationArgs(**arguments)
    plan = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def written(weight):
        symmetric, size = weights.symmetric, group or weight.shape[1]
        if weights.type == "float":
            scales, zeros = weight.abs().amax(1, keepdim=True) / 448, None
        else:
            _, scales, zeros = writers.integers(
                weight, weights.num_bits, size, symmetric, torch.bfloat16
            )
            zeros = (zeros.int() - 2 ** (weights.num_bits - 1)).to(torch.int8)
        state = {"weight": weight, "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = zeros
        tensors = compressor.compress(state, plan)
        values = compressor.decompress(
            {name: t.float() if name == "weight_scale" else t for name, t in tensors.items()}, plan
        )
        return tensors, values["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head"],
    }
    return config, written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(scheme, family, tmp_path):
    folder = writers.write(model(family), tmp_path, *compressed(scheme))
    read = open_source(folder).model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def write_mxfp4(folder):
    """A gpt-oss with experts in blocks and scales; the values are those of transformers."""
    built = model("gpt_oss")
    built.save_pretrained(folder / "plain")
    stored, values = {}, {}
    with safe_open(folder / "plain/model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if not name.endswith(("gate_up_proj", "down_proj")):
                stored[name] = values[name] = tensor
                continue
            rounded = quantise(Format("mxfp4", 32), tensor.float().mT)
            e, n, k = rounded.codes.shape
            pairs = rounded.codes.view(e, n, k // 32, 16, 2)
            blocks, scales = pairs[..., 0] | pairs[..., 1] << 4, rounded.scales
            stored |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales}
            values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            values[name] = values[name].contiguous()
    save_file(values, folder / "plain/model.safetensors", {"format": "pt"})
    (folder / "quantised").mkdir()
    save_file(stored, folder / "quantised/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "quantised/config.json").write_text(json.dumps(config))
    return folder / "quantised"


def test_mxfp4(tmp_path):
    folder = write_mxfp4(tmp_path)
    read = open_source(folder).model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
