"""The machine code of the kernels by nvcc, without a GPU: registers, spills, shared memory,
instructions.

Spills, and local arrays indexed by a variable, go to slow local memory: the code must not contain
LDL or STL.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tvm.tirx import PrimFunc

from moec.codegen.backends.cuda.backend import Cubin, cubin
from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.append import append
from moec.codegen.cuda.attention.key_tiles import WARPS
from moec.codegen.cuda.attention.tiles import tile_attention
from moec.codegen.cuda.attention.warps import attention
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.grouped_wgmma import (
    COLUMNS,
    THREADS,
    shared_memory,
)
from moec.codegen.cuda.gemm.tiles import CODES, FLOATS, LARGE, SMALL, TileShape
from moec.codegen.cuda.instructions import WARP
from moec.codegen.cuda.norm import norm
from moec.codegen.cuda.quantised.grouped_codes import gemv_codes, grouped_codes
from moec.codegen.cuda.routing.dispatch import combine, dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.specs.attention import AnglesSpec, AppendSpec, AttentionSpec
from moec.codegen.specs.norm import NormSpec
from moec.codegen.specs.products import LinearSpec, QuantisedSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.ir.formats.notation import parse
from moec.ir.ops.routing.routing import Routing
from moec.target import nvidia
from moec.target.cuda import TARGETS, CudaTarget
from tests.codegen.cuda.launches import gemv, grouped_linear_wgmma

FORMATS = ("int8", "int4:32:asymmetric", "fp8:128", "mxfp4")
LOOKED_INTO = (
    *("gated-large", "gated-small", "few", "mxfp4", "route", "dispatch"),
    *("float32-floats", "int8-codes", "int4:32:asymmetric-codes", "fp8:128-codes", "mxfp4-codes"),
)
ARCHES = ("cuda:sm_80", "cuda:sm_89", "cuda:sm_90a", "cuda:sm_100a")
SHAPES = {"large": LARGE, "small": SMALL, "codes": CODES, "floats": FLOATS}
needs_nvcc = pytest.mark.skipif(nvidia.nvcc() is None, reason="no nvcc")


GATED = LinearSpec(768, 2048, "bfloat16", groups=128, gated=True)


def grouped(shape: TileShape, *, is_gated: bool = True) -> Callable[[CudaTarget], PrimFunc]:
    """Qwen3-30B-A3B's products: 128 experts, 768 wide, of a model of 2048."""
    plain = LinearSpec(2048, 768, "bfloat16", groups=128)
    if is_gated:
        return lambda target: grouped_linear(
            GATED, target, epilogue=gated(silu), top_k=8, shape=shape
        )
    return lambda target: grouped_linear(plain, target, shape=shape)


def codes(format: str, shape: TileShape | None = None) -> Callable[[CudaTarget], PrimFunc]:
    spec = QuantisedSpec(768, 2048, "bfloat16", groups=128, gated=True, format=parse(format))
    if shape is None:
        return lambda target: gemv_codes(spec, target, epilogue=gated(silu), top_k=8)
    return lambda target: grouped_codes(spec, target, epilogue=gated(silu), top_k=8, shape=shape)


GROUPS = Routing(
    8, score="sigmoid", renormalize=True, groups=8, top_groups=4, group_score="top2sum"
)
KERNELS: dict[str, Callable[[CudaTarget], PrimFunc]] = {
    **{f"gated-{name}": grouped(shape) for name, shape in list(SHAPES.items())[:2]},
    "plain-large": grouped(LARGE, is_gated=False),
    "few": lambda t: gemv(GATED, t, epilogue=gated(silu), top_k=8),
    "few32": lambda t: gemv(replace(GATED, dtype="float32"), t, epilogue=gated(silu), top_k=8),
    "float32-floats": lambda t: grouped_linear(
        replace(GATED, dtype="float32"), t, epilogue=gated(silu), top_k=8, shape=FLOATS
    ),
    "tf32-floats": lambda t: grouped_linear(
        replace(GATED, dtype="float32"),
        replace(t, tf32=True),
        epilogue=gated(silu),
        top_k=8,
        shape=FLOATS,
    ),
    "float32-small": lambda t: grouped_linear(
        replace(GATED, dtype="float32"), t, epilogue=gated(silu), top_k=8, shape=SMALL
    ),
    **{format: codes(format) for format in FORMATS},
    **{f"{format}-codes": codes(format, CODES) for format in FORMATS},
    "int8:rows16-small": codes("int8:rows16", SMALL),
    "route": lambda t: route(RouteSpec(Routing(8, renormalize=True), 128, "f32"), t),
    "route-groups": lambda t: route(RouteSpec(GROUPS, 256, "f32", "f32"), t),
    "dispatch": lambda t: dispatch(DispatchSpec(128, 8), t),
    "combine": lambda t: combine(CombineSpec(128, 8, 2048, "bfloat16", "bfloat16", "float32"), t),
}
ONE_ARCH = (
    "few32",
    *(name for name in KERNELS if name.startswith(("int", "fp8", "float", "tf32", "mxfp4"))),
)
"""The others are compiled for all architectures in one piece: `few_bits_and_float32`."""
EVERY = [(name, arch) for name in KERNELS for arch in (ARCHES[:1] if name in ONE_ARCH else ARCHES)]
PRODUCTS = [name for name in KERNELS if name.rpartition("-")[2] in SHAPES]


@cache
def compiled(name: str, arch: str) -> Cubin:
    target = TARGETS[arch]
    return cubin(lowered(KERNELS[name](target), target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), EVERY)
def test_nothing_spills(name: str, arch: str) -> None:
    result = compiled(name, arch)
    assert result.spills == 0
    threads = SHAPES[name.rpartition("-")[2]].threads if name in PRODUCTS else 512
    assert result.registers * threads <= TARGETS[arch].registers, "no block fits an SM"


@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), [case for case in EVERY if case[0] in PRODUCTS])
def test_shared_memory_is_within_the_limit(name: str, arch: str) -> None:
    stages = SHAPES[name.rpartition("-")[2]].shared_memory
    assert compiled(name, arch).static_shared + stages <= TARGETS[arch].shared_memory


@cache
def by_wgmma(*, is_gated: bool) -> Cubin:
    target = TARGETS["cuda:sm_90a"]
    spec = LinearSpec(1536, 2048, "bfloat16", groups=128, gated=is_gated)
    kernel = grouped_linear_wgmma(spec, target, epilogue=gated(silu) if is_gated else None)
    return cubin(lowered(kernel, target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize("is_gated", [False, True])
def test_wgmma_spills_nothing(is_gated: bool) -> None:
    result = by_wgmma(is_gated=is_gated)
    assert result.spills == 0
    assert result.registers * THREADS <= TARGETS["cuda:sm_90a"].registers
    # A launch gives all threads as many; the loading group then gives what the others take.
    assert (56 + 2 * 224) * 128 <= result.registers * THREADS
    assert result.static_shared + shared_memory(COLUMNS[-1]) <= TARGETS["cuda:sm_90a"].shared_memory


HALF_ANGLES = AnglesSpec("bf16", (True, False, True), 64)
HEADS = AttentionSpec("bf16", 32, 4, 128, 128, 128**-0.5, is_causal=True, sinks=True)


@cache
def beside_products(arch: str) -> Cubin:
    """What a layer of Qwen3-30B-A3B needs beside products and routing, in one compilation."""
    target = TARGETS[arch]
    turns = (HALF_ANGLES, HALF_ANGLES)
    kernels = (
        append(AppendSpec("bf16", 4, 128, tokens_first=True), target, "append"),
        append(AppendSpec("bf16", 4, 128, turns=turns), target, "turn_append"),
        attention(HEADS, target, "prefill"),
        attention(replace(HEADS, placed=True), target, "decode"),
        norm(NormSpec("rms", 2048, 1e-6, "bf16", "bf16", "bf16", residual=True), target, "norm"),
    )
    return cubin(lowered(*kernels, target=target).source, target)


WIDTHS = ((64, 64), (80, 80), (192, 128), (256, 256))


@cache
def attention_tiles(arch: str) -> Cubin:
    """For heads of 128 features, on all architectures; on one, for others too."""
    target = TARGETS[arch]
    widths = WIDTHS if arch == ARCHES[0] else ()
    kernels = (
        tile_attention(replace(HEADS, placed=True), target, "causal"),
        *(
            tile_attention(replace(HEADS, key_dim=key, value_dim=value), target, f"width{key}")
            for key, value in widths
        ),
    )
    return cubin(lowered(*kernels, target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_spills_of_attention_tiles(arch: str, tmp_path: Path) -> None:
    result = attention_tiles(arch)
    assert result.spills == 0
    assert result.registers * WARPS * WARP * 2 <= TARGETS[arch].registers, "two blocks fit an SM"
    if tool("nvdisasm") is not None:
        words = instructions(result, tmp_path)
        stems = {word.partition(".")[0] for word in words}
        assert not stems & {"LDL", "STL"}
        assert {"HMMA", "LDGSTS", "MUFU", "SHFL"} <= stems
        assert {"HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4"} <= words
        assert "STG.E.U16" not in words, "neighbours are stored as one word"


@cache
def few_bits_and_float32(arch: str) -> Cubin:
    """Gated products of few bits, in float32 and in TF32, in one compilation."""
    target = TARGETS[arch]
    tf32, floats = replace(target, tf32=True), replace(GATED, dtype="float32")
    options: Any = {"epilogue": gated(silu), "top_k": 8}
    formats = {
        format.replace(":", "_"): QuantisedSpec(
            768, 2048, "bfloat16", groups=128, gated=True, format=parse(format)
        )
        for format in FORMATS
    }
    kernels = (
        *(gemv_codes(spec, target, name=f"few_{n}", **options) for n, spec in formats.items()),
        *(
            grouped_codes(spec, target, shape=CODES, name=n, **options)
            for n, spec in formats.items()
        ),
        gemv(floats, target, name="few", **options),
        grouped_linear(floats, target, shape=FLOATS, name="floats", **options),
        grouped_linear(floats, tf32, shape=FLOATS, name="tf32", **options),
    )
    return cubin(lowered(*kernels, target=target).source, target)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES[1:])
def test_nothing_spills_of_few_bits_and_float32(arch: str, tmp_path: Path) -> None:
    result, target = few_bits_and_float32(arch), TARGETS[arch]
    assert result.spills == 0
    threads = max(CODES.threads, FLOATS.threads)
    assert result.registers * threads <= target.registers, "no block fits an SM"
    dynamic = max(CODES.shared_memory, FLOATS.shared_memory)
    assert result.static_shared + dynamic <= target.shared_memory
    if tool("nvdisasm") is not None:
        words = instructions(result, tmp_path)
        stems = {word.partition(".")[0] for word in words}
        assert not stems & {"LDL", "STL"}
        assert {"HMMA", "FFMA", "LDSM", "LDGSTS", "SHFL"} <= stems
        for multiply in ("HMMA.16816.F32", "HMMA.1688.F32.TF32"):
            assert any(word.startswith(multiply) for word in words), multiply


@needs_nvcc
@pytest.mark.parametrize("arch", ["cuda:sm_86", "cuda:sm_120"])
def test_nothing_spills_on_other_architectures(arch: str, tmp_path: Path) -> None:
    """The kernels with the most registers, in one compilation."""
    target = TARGETS[arch]
    options: Any = {"epilogue": gated(silu), "top_k": 8}
    mxfp4 = QuantisedSpec(768, 2048, "bfloat16", groups=128, gated=True, format=parse("mxfp4"))
    kernels = (
        grouped_linear(GATED, target, shape=LARGE, name="large", **options),
        gemv_codes(mxfp4, target, name="few", **options),
        grouped_codes(mxfp4, target, shape=CODES, name="codes", **options),
        tile_attention(replace(HEADS, placed=True), target, "causal"),
    )
    result = cubin(lowered(*kernels, target=target).source, target)
    assert result.spills == 0
    assert result.registers * 256 <= target.registers
    assert result.static_shared + LARGE.shared_memory <= target.shared_memory
    if tool("nvdisasm") is not None:
        stems = {word.partition(".")[0] for word in instructions(result, tmp_path)}
        assert not stems & {"LDL", "STL"}
        assert {"HMMA", "LDSM", "LDGSTS", "SHFL"} <= stems


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_spills_beside_products(arch: str, tmp_path: Path) -> None:
    result = beside_products(arch)
    assert result.spills == 0
    assert result.registers <= 64, "four blocks of 256 threads fit an SM"
    assert 0 < result.static_shared <= 8 * (128 + 2) * 4 + 64
    if tool("nvdisasm") is not None:
        stems = {word.partition(".")[0] for word in instructions(result, tmp_path)}
        assert not stems & {"LDL", "STL"}
        assert {"SHFL", "MUFU", "BAR"} <= stems


def tool(name: str) -> str | None:
    """CUDA's, from $PATH or from the wheels that hold it."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    wheels = [str(path) for folder in folders or () for path in Path(folder).glob("*/bin")]
    return shutil.which(name) or shutil.which(name, path=":".join(wheels))


needs_disassembler = pytest.mark.skipif(tool("nvdisasm") is None, reason="no nvdisasm")


def instructions(kernel: Cubin, folder: Path) -> set[str]:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.content)
    command = [str(tool("nvdisasm")), "-c", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
    return set(re.findall(line, text, re.M))


@needs_nvcc
@needs_disassembler
def test_instructions_of_wgmma(tmp_path: Path) -> None:
    words = instructions(by_wgmma(is_gated=True), tmp_path)
    stems = {word.partition(".")[0] for word in words}
    assert {"HGMMA", "UTMALDG", "SYNCS", "USETMAXREG"} <= stems
    assert not stems & {"LDL", "STL", "HMMA"}


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize(("name", "arch"), [case for case in EVERY if case[0] in LOOKED_INTO])
def test_instructions(name: str, arch: str, tmp_path: Path) -> None:
    words = instructions(compiled(name, arch), tmp_path)
    stems = {word.partition(".")[0] for word in words}
    assert not stems & {"LDL", "STL"}
    if name.startswith("float32"):
        assert {"FFMA", "LDS", "LDGSTS"} <= stems
        assert "LDS.128" in words
    elif name in PRODUCTS:
        assert {"HMMA", "LDSM", "LDGSTS"} <= stems
        multiply = "HMMA.16816.F32" if "codes" in name else "HMMA.16816.F32.BF16"
        assert any(word.startswith(multiply) for word in words)
        widened = {"HFMA2", "HMUL2", "HADD2"}
        assert stems & widened or "codes" not in name, "codes are widened by pairs"
        assert "LDSM.16.M88.4" in words
        assert "STG.E.U16" not in words, "neighbours are stored as one word"
    else:
        expected = {"route": {"REDUX", "CREDUX"}, "dispatch": {"MATCH"}}
        assert stems & expected.get(name, {"SHFL"})
    if name in ("few", "mxfp4"):
        assert any(word.startswith("LDG.E.NA.128") for word in words), "16 bytes at once"
