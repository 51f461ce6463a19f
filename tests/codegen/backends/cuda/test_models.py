"""Whole models for GPUs: all families become CUDA C, and four of them run, emulated."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.model.compiled import CompiledModel
from tests.cuda_emulator.emulate import SCHEDULES, needs_compiler
from tests.cuda_emulator.models import emulated_model
from tests.models.families import FAMILIES

TARGET = "cuda:sm_80,sm_90a"
# A softmax, a sigmoid with groups and a shared expert, biases with sinks, a gated shared expert.
RUN = {
    "mixtral": torch.bfloat16,
    "deepseek_v3": torch.float32,
    "gpt_oss": torch.float32,
    "qwen2_moe": torch.bfloat16,
}
# Of the greatest logit. float32: sums in another order. bf16: rounded where eager does not round,
# and otherwise.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compiled(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, CompiledModel]:
    family = FAMILIES[name]
    model = family.build(dtype)
    compiled_model = moec.compile(
        model, kwargs=family.inputs(2, 9), target=TARGET, backend=CUDA_TEXT, verify=False
    )
    return model, compiled_model


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - RUN.keys()))
def test_families_become_cuda_c(name: str) -> None:
    _, model = compiled(name, torch.float32)
    assert model.package is not None
    assert model.package.gpu is not None
    source = model.package.gpu.parts["kernels.cu"].decode()
    assert all(f" {launch.name}(" in source for launch in model.package.gpu.launches)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("name", RUN)
def test_emulated_models_equal_eager(name: str) -> None:
    dtype = RUN[name]
    model, compiled_model = compiled(name, dtype)
    assert compiled_model.package is not None
    run = emulated_model(compiled_model.package)
    for number, (batch, sequence) in enumerate([(2, 9), (1, 5)]):
        inputs = FAMILIES[name].inputs(batch, sequence, seed=number)
        with torch.no_grad():
            expected = model(**inputs).logits.float()
        ports = compiled_model.package.main.inputs
        values = {port.name: inputs[port.name] for port in ports}
        result = run(values, schedule=SCHEDULES[number]).popitem()[1].float()
        error = (result - expected).abs().max() / expected.abs().max()
        assert error <= NEAR[dtype]
