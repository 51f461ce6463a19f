"""Registers, memory and instructions of products whose k is split, as ptxas reports them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.compiler.cubin import Cubin, cubin
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.cuda.gemm.grouped import grouped_linear, linear
from moec.codegen.cuda.gemm.split_k import split_k, split_of
from moec.codegen.cuda.gemm.tiles import LARGE, SMALL
from moec.codegen.specs.products import LinearSpec
from moec.target.cuda import TARGETS
from tests.codegen.cuda.test_static import ARCHES, instructions, needs_nvcc, tool


@cache
def by_split_k(arch: str) -> Cubin:
    """The output, query and key projections of Qwen3-30B-A3B, and one with tails."""
    target = TARGETS[arch]
    specs = [LinearSpec(n, k, "bfloat16") for n, k in ((2048, 4096), (4096, 2048), (512, 2048))]
    specs.append(LinearSpec(2000, 2200, "float16", bias=True))
    kernels = []
    for number, spec in enumerate(specs):
        split = split_of(spec, TARGETS["cuda:sm_90a"].sms)
        assert split is not None
        kernels.append(split_k(spec, split, f"split{number}"))
    return cubin(lowered(*kernels, target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_spills_of_split_k(arch: str, tmp_path: Path) -> None:
    result = by_split_k(arch)
    assert result.spills == 0
    assert result.registers * 512 <= TARGETS[arch].registers, "a block of 16 warps fits an SM"
    assert result.static_shared <= 48 * 1024
    if tool("nvdisasm") is not None:
        words = instructions(result, tmp_path)
        assert not {word.partition(".")[0] for word in words} & {"LDL", "STL"}
        assert {"HMMA.16816.F32.BF16", "HMMA.16816.F32"} <= words
        assert any(word.startswith("LDG.E.NA.128") for word in words), "16 bytes at once"


@cache
def by_split_blocks(arch: str) -> Cubin:
    """The router of DeepSeek-V3, an output projection of Qwen3-30B-A3B, and few narrow experts."""
    target = TARGETS[arch]
    router, projection = LinearSpec(256, 7168, "float32"), LinearSpec(2048, 4096, "bfloat16")
    experts = LinearSpec(512, 2048, "bfloat16", groups=4, gated=True, bias=True)
    kernels = (
        linear(router, target, splits=True, name="router"),
        linear(projection, target, splits=True, name="projection"),
        grouped_linear(
            experts, target, epilogue=gated(silu), top_k=2, shape=SMALL, splits=True, name="experts"
        ),
    )
    return cubin(lowered(*kernels, target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize("arch", [*ARCHES, "cuda:sm_86", "cuda:sm_120"])
def test_nothing_spills_of_split_blocks(arch: str, tmp_path: Path) -> None:
    result = by_split_blocks(arch)
    assert result.spills == 0
    assert result.registers * 256 <= TARGETS[arch].registers
    assert result.static_shared + LARGE.shared_memory <= TARGETS[arch].shared_memory
    if tool("nvdisasm") is not None:
        words = instructions(result, tmp_path)
        assert not {word.partition(".")[0] for word in words} & {"LDL", "STL"}
        assert {"HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDS.128", "FFMA"} <= words
