"""GPU targets: their names, which GPUs run them, and the message if there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.commands import machine
from moec.errors import TargetError, UsageError
from moec.target import cpu, nvidia
from moec.target.cuda import TARGETS, parse
from moec.target.named import parse as parse_any

H100 = nvidia.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9)


@pytest.mark.parametrize("name", TARGETS)
def test_names(name: str) -> None:
    target = parse_any(name)
    assert target == parse(name) == TARGETS[name]
    assert target.kind == "cuda"
    assert target.needs == TARGETS[name].needs
    assert TARGETS[name].tvm()["arch"] == name.removeprefix("cuda:")


def test_other_names_are_those_of_cpus() -> None:
    assert parse_any("avx2") is cpu.TARGETS["avx2"]
    with pytest.raises(TargetError, match=r"unknown target 'z80'; .* cuda:sm_80 and other GPUs"):
        parse_any("z80")


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:", "cuda:sm_80,sm_70", "cuda:sm_80,sm_80"])
def test_unknown_gpus(name: str) -> None:
    with pytest.raises(
        TargetError, match=f"unknown target '{name}'; the known GPUs are cuda, cuda:"
    ):
        parse_any(name)


def test_which_gpu_runs_which() -> None:
    by_arch = {t.arch: t for t in TARGETS.values()}
    runs = {arch: t.runs_on((8, 9)) for arch, t in by_arch.items()}
    assert [arch for arch, yes in runs.items() if yes] == ["sm_80", "sm_86", "sm_89"]
    assert by_arch["sm_80"].runs_on((9, 0)), "by its PTX"
    assert not nvidia.runs("sm_100a", (10, 3)), "the cubin of an `a` runs on that chip alone"
    assert by_arch["sm_100a"].runs_on((10, 3)), "by its PTX"
    assert not by_arch["sm_89"].runs_on((8, 0)), "no code runs on an older GPU"


def test_parts() -> None:
    """Each architecture alone, and PTX of the newest: for sm_90a of a target without wgmma."""
    both, tf32 = parse("cuda:sm_80,sm_90a"), parse("cuda:sm_80,sm_86+tf32")
    assert [t.name for t in both.parts] == ["cuda:sm_80", "cuda:sm_90a", "cuda:sm_90"]
    assert both.parts[:2] == (TARGETS["cuda:sm_80"], TARGETS["cuda:sm_90a"])
    assert (both.parts[2].tensor_cores, both.parts[2].sms) == (("mma",), 132)
    assert [(t.name, t.tf32) for t in tf32.parts] == [
        ("cuda:sm_80+tf32", True),
        ("cuda:sm_86+tf32", True),
    ]
    assert TARGETS["cuda:sm_86"].parts == (TARGETS["cuda:sm_86"],)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, r"there is no NVIDIA driver here \(libcuda.so.1\): name the GPU"),
        (nvidia.Driver("13.0", ()), "the NVIDIA driver finds no GPU: name the GPU"),
        (
            nvidia.Driver("12.0", (nvidia.Gpu("Tesla V100", (7, 0), 16 * 10**9),)),
            "Tesla V100 has compute capability 7.0, and moec generates code for cuda:sm_80",
        ),
    ],
)
def test_this_machines_gpu_is_missing(
    monkeypatch: pytest.MonkeyPatch, driver: nvidia.Driver | None, words: str
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: driver)
    with pytest.raises(TargetError, match=words):
        parse("cuda")


def test_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", (H100,)))
    assert parse("cuda") is TARGETS["cuda:sm_90a"]
    ada = nvidia.Gpu("L4", (8, 9), 24 * 10**9)
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", (ada,)))
    assert parse("cuda") is TARGETS["cuda:sm_89"]


def test_several_gpus() -> None:
    target = parse("cuda:sm_90a,sm_80")
    assert target.name == "cuda:sm_80,sm_90a"
    assert (target.arch, target.archs) == ("sm_80", ("sm_80", "sm_90a"))
    assert target.tensor_cores == ("mma",), "what both have"
    assert target.shared_memory == TARGETS["cuda:sm_80"].shared_memory
    assert not target.runs_on((7, 5))
    assert all(target.runs_on(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0)))


@pytest.mark.parametrize("target", ["cuda:sm_80", TARGETS["cuda:sm_90a"]])
def test_what_cannot_run_here_is_refused_before_the_model_is_looked_at(
    target: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: None)
    name = getattr(target, "name", target)
    words = (
        rf"lacks an NVIDIA driver \(libcuda.so.1\), so the result for {name} cannot be verified "
        r"here: verify its graph and weights alone"
    )
    with pytest.raises(UsageError, match=words):
        moec.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), target=target)
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", ()))
    with pytest.raises(UsageError, match="lacks a GPU that runs code for sm_"):
        moec.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), target=target)


def test_doctor() -> None:
    without = {check.name: check.says for check in machine.gpus(None, None, None)}
    assert without == {
        "gpu": "none; needed for cuda targets only",
        "nvcc": "none; cuda targets need nvcc or NVRTC",
        "nvrtc": "none; cuda targets need nvcc or NVRTC",
    }
    nvcc = nvidia.Compiler("/usr/bin/nvcc", "13.0.88")
    nvrtc = nvidia.Compiler("/lib/libnvrtc.so.13", "13.5", nvidia.NVRTC)
    driver = nvidia.Driver("13.0", (H100,))
    checks = {check.name: check.says for check in machine.gpus(driver, nvcc, nvrtc)}
    assert checks == {
        "gpu": "NVIDIA H100 80GB HBM3 (9.0, 80 GB); the driver runs CUDA 13.0",
        "nvcc": "13.0.88, /usr/bin/nvcc; compiles for cuda targets",
        "nvrtc": "13.5, /lib/libnvrtc.so.13; not used, as nvcc is installed",
    }
    checks = {check.name: check.says for check in machine.gpus(driver, None, nvrtc)}
    assert checks["nvrtc"] == "13.5, /lib/libnvrtc.so.13; compiles for cuda targets"


def test_nvrtc_is_of_no_use_without_headers_or_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "without"))
    assert nvidia.nvrtc() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("cuda_bf16.h", "crt/host_defines.h", "cccl/cuda/std/cstdint"):
        path = tmp_path / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnvrtc.so.13").write_text("no library")
    assert nvidia.nvrtc() is None


def test_cpu_code_imports_nothing_of_cuda_and_no_slow_library_that_few_models_need() -> None:
    code = (
        "import sys, moec, moec.api, moec.codegen.package\n"
        "mine = [m for m in sys.modules if m.startswith('moec.') and m != 'moec.target.cuda']\n"
        "assert not [m for m in mine if '.cuda' in m or m == 'moec.runtime.device.gpu']\n"
        "assert not {'numba', 'scipy.optimize'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tf32_is_a_part_of_the_name() -> None:
    target = parse("cuda:sm_80,sm_90a+tf32")
    assert (target.name, target.tf32) == ("cuda:sm_80,sm_90a+tf32", True)
    assert target.archs == ("sm_80", "sm_90a")
    assert not parse("cuda:sm_80").tf32


def test_tf32_is_for_float32() -> None:
    words = (
        r"target 'cuda:sm_80\+tf32': .* the weights of this model are bfloat16: leave \+tf32 out"
    )
    model, x = torch.nn.Linear(8, 8).bfloat16(), torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=words):
        moec.compile(model, (x,), target="cuda:sm_80+tf32", backend=CUDA_TEXT, verify=False)
    compiled = moec.compile(
        model.float(), (x.float(),), target="cuda:sm_80+tf32", backend=CUDA_TEXT, verify=False
    )
    assert compiled.package is not None
    assert compiled.package.gpu is not None
    assert b"mma_sync_aligned_m16n8k8" in compiled.package.gpu.parts["sm_80.cu"]
