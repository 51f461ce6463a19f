"""A package for sm_90a multiplies many rows by wgmma, and equals torch on an emulated GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.codegen.package import build
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.runtime.package import TENSOR_MAP, Package
from moec.target.cuda import parse as parse_target
from tests.cuda_emulator.emulate import SCHEDULES
from tests.cuda_emulator.models import emulated_model

EXPERTS = 2
ARCHES = ("sm_80", "sm_90a")
TEXT = """graph main(x: bf16[T, 64], i: i64[T, 1], s: f32[T, 1];
    p: bf16[64, 64], u: bf16[2, 72, 64], d: bf16[2, 64, 72]) {
  h: bf16[T, 64] = aten.linear.default(x, p)
  order: i32[T], slots: i32[T, 1], ends: i32[2] = moe.sort(i) <num_experts=2>
  a: bf16[T, 72] = grouped.linear(h, ends, u, order) <matrices=1, gather=1>
  y: bf16[T, 64] = grouped.linear(a, ends, d) <matrices=1>
  out: bf16[T, 64] = moe.combine(y, slots, s) <k=1, tokens={T}, weighted=true>
  return out
}"""


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"p": (64, 64), "u": (EXPERTS, 72, 64), "d": (EXPERTS, 64, 72)}
    return {n: (torch.randn(s, generator=generator) / 8).bfloat16() for n, s in shapes.items()}


def package(target: str) -> Package:
    module = Module.of(Program(parse(TEXT), weights()))
    return build(module, parse_target(target), backend=CUDA_TEXT)


def maps(package: Package) -> dict[str, int]:
    """The number of kernels that copy by tensor maps, for each architecture."""
    assert package.gpu is not None
    return {
        arch: sum(TENSOR_MAP in launch.arguments for launch in launches)
        for arch, launches in package.gpu.launches.items()
    }


def test_where_wgmma_multiplies() -> None:
    """The dense product, the one that gathers rows, and the one of sorted rows."""
    assert maps(package("cuda:sm_90a")) == {"sm_90a": 3, "sm_90": 0}
    assert maps(package("cuda:sm_80")) == {"sm_80": 0}


def test_a_part_is_what_its_target_alone_would_be() -> None:
    both, alone = package("cuda:sm_80,sm_90a").gpu, [package(f"cuda:{a}").gpu for a in ARCHES]
    assert both is not None
    for code in alone:
        assert code is not None
        for arch, launches in code.launches.items():
            assert both.launches[arch] == launches
            assert both.parts[f"{arch}.cu"] == code.parts[f"{arch}.cu"]
    assert both.launches.keys() == {"sm_80", "sm_90a", "sm_90"}


@pytest.mark.parametrize(("rows", "arch"), [(70, "sm_90a"), (3, "sm_90a"), (70, "sm_90")])
def test_results_are_those_of_torch(rows: int, arch: str) -> None:
    """By wgmma, with so few rows that each is computed by a warp, and as PTX for later GPUs."""
    run = emulated_model(package("cuda:sm_80,sm_90a"), arch=arch)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    i = torch.randint(EXPERTS, (rows, 1), generator=generator)
    s = torch.rand(rows, 1, generator=generator)
    w = {name: tensor.float() for name, tensor in weights().items()}
    h = (x.float() @ w["p"].T).bfloat16().float()
    a = torch.einsum("td,tnd->tn", h, w["u"][i[:, 0]]).bfloat16().float()
    expected = s * torch.einsum("tn,tdn->td", a, w["d"][i[:, 0]])
    for schedule in SCHEDULES[:: 3 if rows > 32 else 4]:
        result = run({"x": x, "i": i, "s": s}, schedule=schedule)["out"]
        error = (torch.as_tensor(result).float() - expected).abs().max()
        assert error <= 2**-7 * expected.abs().max()
