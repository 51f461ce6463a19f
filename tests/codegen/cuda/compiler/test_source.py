"""CUDA C: changes of kernels are visible in it; generating it needs neither CUDA nor a GPU."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx import PrimFunc

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.tiles import TileShape
from moec.codegen.cuda.routing.dispatch import combine
from moec.codegen.cuda.routing.route import route
from moec.codegen.specs.products import LinearSpec
from moec.codegen.specs.routing import CombineSpec, RouteSpec
from moec.ir.ops.routing.routing import Routing
from moec.target.cuda import TARGETS

A100 = TARGETS["cuda:sm_80"]


def code(kernel: PrimFunc) -> str:
    """Without what TVM puts before every kernel."""
    source = lowered(kernel, target=A100).source
    return source[source.rindex('extern "C" __global__') :]


def test_router(golden: Callable[[str], None]) -> None:
    golden(code(route(RouteSpec(Routing(2, renormalize=True), 8, "f32"), A100)))


def test_combine(golden: Callable[[str], None]) -> None:
    golden(code(combine(CombineSpec(8, 2, 64, "bfloat16", "bfloat16", "float32"), A100)))


def test_product(golden: Callable[[str], None]) -> None:
    spec = LinearSpec(16, 32, "bfloat16", groups=4, gated=True)
    shape = TileShape(16, 32, 32, warp_rows=1, warp_columns=1, stages=2)
    golden(code(grouped_linear(spec, A100, epilogue=gated(silu), top_k=2, shape=shape)))


def test_a_kernel_is_written_the_same_way_twice() -> None:
    kernel = route(RouteSpec(Routing(2), 8, "f32"), A100)
    assert code(kernel) == code(kernel)


def test_sizes_that_exceed_32_bits_are_computed_in_64() -> None:
    """DeepSeek-V3's experts: 256 * 4096 * 7168 elements."""
    spec = LinearSpec(4096, 7168, "bfloat16", groups=256)
    copies = [line for line in code(grouped_linear(spec, A100)).splitlines() if "cp_async" in line]
    weights = [line for line in copies if "(int64_t)29360128" in line]  # 4096 * 7168
    assert weights
    assert not [line for line in copies if " * 29360128" in line]


def test_kernels_of_different_types_share_a_source() -> None:
    """nvcc refuses two types of dynamic shared memory under one name."""
    kernels = [
        grouped_linear(LinearSpec(16, 32, dtype, groups=4), A100, name=dtype)
        for dtype in ("bfloat16", "float16", "float32")
    ]
    lines = lowered(*kernels, target=A100).source.splitlines()
    declared = {line.strip().partition(";")[0] for line in lines if "extern __shared__" in line}
    assert declared == {"extern __shared__ __align__(128) uchar dynamic_shared[]"}
