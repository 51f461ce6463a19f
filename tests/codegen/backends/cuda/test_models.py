"""Whole models for GPUs: all families become CUDA C. Four of them run on the emulator, and two of
these also generate text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.model.compiled import CompiledModel
from moec.runtime.package import DECODE, TENSOR_MAP
from moec.runtime.text.texts import Texts
from tests.cuda_emulator.emulate import SCHEDULES, EmulationError
from tests.cuda_emulator.models import EmulatedModel, emulated_model
from tests.models.captured import captured_module
from tests.models.families import SMALL
from tests.once import Once

TARGET = "cuda:sm_80,sm_90a"
# A softmax, a sigmoid with groups and a shared expert, biases with sinks, a gated shared expert.
RUN = {
    "mixtral": torch.bfloat16,
    "deepseek_v3": torch.float32,
    "gpt_oss": torch.float32,
    "qwen2_moe": torch.bfloat16,
}
# Where the tokens of texts are fed in pieces too: keys and values of MLA, a window with sinks, and
# in 16 bits.
CONTINUED = ("deepseek_v3", "gpt_oss", "mixtral")
TEXTS = [[5, 9, 12, 7, 33], [100, 3, 64, 8, 20]]
# Of the greatest logit. float32: sums in another order. bf16: rounded where eager does not round,
# and otherwise.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compiled(
    name: str, dtype: torch.dtype, kv_cache: bool = True, target: str = TARGET
) -> tuple[torch.nn.Module, CompiledModel]:
    family = SMALL[name]
    model = family.build(dtype)
    compiled_model = moec.compile(
        model,
        kwargs=family.inputs(2, 9),
        target=target,
        backend=CUDA_TEXT,
        verify=False,
        kv_cache=kv_cache,
    )
    return model, compiled_model


@pytest.mark.parametrize("name", sorted(SMALL.keys() - RUN.keys()))
def test_families_become_cuda_c(name: str, once: Once) -> None:
    module = captured_module(name, once)
    model = moec.compile(module, target=TARGET, backend=CUDA_TEXT, verify=False)
    assert model.package is not None
    assert model.package.gpu is not None
    continues = name != "switch_transformers"  # an encoder and a decoder
    assert (DECODE in model.package.functions) == continues, model.no_decode
    for arch, launches in model.package.gpu.launches.items():
        source = model.package.gpu.parts[f"{arch}.cu"].decode()
        assert all(f" {launch.name}(" in source for launch in launches)


@pytest.mark.parametrize("name", RUN)
def test_emulated_models_equal_eager(name: str) -> None:
    dtype = RUN[name]
    model, compiled_model = compiled(name, dtype, kv_cache=name in CONTINUED)
    assert compiled_model.package is not None
    run = emulated_model(compiled_model.package)
    for number, (batch, sequence) in enumerate([(2, 9), (1, 5)]):
        inputs = SMALL[name].inputs(batch, sequence, seed=number)
        with torch.no_grad():
            expected = model(**inputs).logits.float()
        ports = compiled_model.package.main.inputs
        values = {port.name: inputs[port.name] for port in ports}
        result = run(values, schedule=SCHEDULES[number]).popitem()[1].float()
        error = (result - expected).abs().max() / expected.abs().max()
        assert error <= NEAR[dtype]
    if name in CONTINUED:
        assert _continued(model, run) <= NEAR[dtype]


def test_a_prompt_on_sm_90a_uses_wgmma() -> None:
    """160 rows of experts and 80 of linear layers are many."""
    model, compiled_model = compiled(
        "mixtral", torch.bfloat16, kv_cache=False, target="cuda:sm_90a"
    )
    package = compiled_model.package
    assert package is not None
    assert package.gpu is not None
    assert any(TENSOR_MAP in launch.arguments for launch in package.gpu.launches["sm_90a"])
    inputs = SMALL["mixtral"].inputs(2, 40)
    with torch.no_grad():
        expected = model(**inputs).logits.float()
    values = {port.name: inputs[port.name] for port in package.main.inputs}
    result = emulated_model(package)(values).popitem()[1].float()
    error = (result - expected).abs().max() / expected.abs().max()
    assert error <= NEAR[torch.bfloat16]


def _continued(model: torch.nn.Module, run: EmulatedModel) -> float:
    """The greatest error of a logit where two texts go in as a prompt and then token by token."""
    texts = Texts(run.executor, len(TEXTS), room=8)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(TEXTS), use_cache=False).logits.float().numpy()
    errors = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        logits = texts.feed([text[start:stop] for text in TEXTS])
        if message := run.library.emulator_message().decode():
            raise EmulationError(message)
        errors.append(np.abs(np.float32(logits) - expected[:, stop - 1]).max())
    return float(max(errors) / np.abs(expected).max())
