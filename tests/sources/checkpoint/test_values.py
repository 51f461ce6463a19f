"""Every format: the model of a quantised folder has the weights that its codes mean, exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moec.capture.doors import open_source
from tests.sources.checkpoint import writers
from tests.sources.checkpoint.families import FAMILIES, model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}  # without its name, as before
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMS = {
    "gptq": (GPTQ, writers.gptq()),
    "gptq-asymmetric": (GPTQ | {"sym": False}, writers.gptq(symmetric=False)),
    "gptq-v2": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        writers.gptq(symmetric=False, v2=True),
    ),
    "gptq-8": (GPTQ | {"bits": 8}, writers.gptq(8)),
    "gptq-2": (GPTQ | {"bits": 2, "sym": False}, writers.gptq(2, symmetric=False)),
    "gptq-rows": (GPTQ | {"group_size": -1}, writers.gptq(group=-1)),
    "gptq-act-order": (GPTQ | {"desc_act": True}, writers.gptq(act_order=True)),
    "awq": (AWQ, writers.awq()),
    "fp8-tensor": (FP8, writers.fp8("weight_scale", writers.of_tensor, E4M3)),
    "fp8-rows": (
        FP8 | {"quant_method": "fbgemm_fp8"},
        writers.fp8("weight_scale", writers.of_rows, E4M3),
    ),
    "fp8-blocks": (
        FP8 | {"weight_block_size": [64, 64]},
        writers.fp8("weight_scale_inv", writers.of_blocks, E4M3),
    ),
    "nf4": (NF4, writers.four_bits()),
    "nf4-nested": (NF4, writers.four_bits(block=128, nested=8)),
    "nf4-words": (NF4, writers.four_bits(words=True)),
    "fp4": (NF4 | {"bnb_4bit_quant_type": "fp4"}, writers.four_bits("fp4", block=4096)),
    "bnb-int8": (INT8, writers.int8_rows),
    "fp8-e5m2": (FP8, writers.fp8("weight_scale", writers.of_tensor, E5M2)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_values(form, family, tmp_path):
    quantization, writer = FORMS[form]
    folder = writers.write(model(family), tmp_path, quantization, writer)
    read = open_source(folder).model.state_dict()
    # transformers reads the values, stored in float32, and rounds them to bfloat16, as moec must
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name
