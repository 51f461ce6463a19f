"""Right models in few bits, none of which verification may refuse: families of transformers with
weights of three deviations, experts in a loop of the model, formats of `--quant` and GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import moec
from benchmarks.models.upcycle import Experts, Mlp
from moec.runtime.call import caches
from moec.runtime.device.tensors import empty
from moec.runtime.dtypes import Array
from tests.models.families import SMALL
from tests.models.other_families import OTHER_FAMILIES
from tests.sources.checkpoint.test_gguf import write

DTYPES = (torch.bfloat16, torch.float16)
DEVIATIONS = (0.02, 0.08, 0.2)
GGUF = ("F16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K", "MXFP4")
Make = Callable[[Path], moec.CompiledModel]


def of_family(
    name: str, std: float, dtype: torch.dtype, folder: Path, quant: str | None = None
) -> moec.CompiledModel:
    fields = {"initializer_range": std, "initializer_factor": std / 0.02}
    family = replace(SMALL[name], fields={**SMALL[name].fields, **fields})
    return moec.compile(family.build(dtype), kwargs=family.inputs(2, 7), quant=quant)


def of_smollm2(dtype: torch.dtype, folder: Path) -> moec.CompiledModel:
    """Its widths and heads; four experts in each of two layers."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=576**-0.5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        experts = [Mlp(layer.mlp) for _ in range(4)]
        for weight in (weight for expert in experts for weight in expert.parameters()):
            weight.data += torch.randn_like(weight) * 0.02
        layer.mlp = Experts(experts, torch.nn.Linear(576, 4))
    return moec.compile(model.to(dtype), (torch.randint(0, 512, (2, 7)),))


def of_file(kind: str, folder: Path) -> moec.CompiledModel:
    write(folder / "model.gguf", "mixtral", kind)
    return moec.compile(folder / "model.gguf")


MODELS: dict[str, Make] = {
    f"{name}-{std}-{DTYPES[(number + turn) % 2]}": partial(
        of_family, name, std, DTYPES[(number + turn) % 2]
    )
    for number, name in enumerate(SMALL)
    for turn, std in enumerate(DEVIATIONS)
}
MODELS |= {f"SmolLM2-{dtype}": partial(of_smollm2, dtype) for dtype in DTYPES}
MODELS |= {
    quant: partial(of_family, "qwen3_moe", 0.2, DTYPES[number % 2], quant=quant)
    for number, quant in enumerate(("int8", "int4:32", "fp8", "mxfp4"))
}
MODELS |= {f"GGUF {kind}": partial(of_file, kind) for kind in GGUF}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_model_is_verified(name: str, tmp_path: Path) -> None:
    assert MODELS[name](tmp_path).checked is not None


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v32"])
def test_what_was_in_the_memory_of_caches_refuses_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that no token was written to hold what was there before: here NaN."""

    def filled(shape: tuple[int, ...], dtype: object) -> Array:
        array = empty(shape, dtype)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(caches, "empty", filled)
    family = OTHER_FAMILIES[name]
    moec.compile(family.build(), (), family.inputs(2, 7))
