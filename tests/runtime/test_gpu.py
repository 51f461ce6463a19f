"""Kernels of GPUs at load: what this machine lacks is said in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.errors import TargetError
from moec.runtime import artifact
from moec.runtime.gpu import arch_for
from moec.runtime.package import GpuCode
from moec.target import nvidia

H100 = nvidia.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9)
CODE = GpuCode(
    "cuda:sm_80,sm_90a", (), {"kernels.cu": b"", "sm_80.cubin": b"", "sm_90a.cubin": b""}
)


@pytest.mark.parametrize(
    ("driver", "index", "words"),
    [
        (None, 0, r"for cuda:sm_80,sm_90a, and there is no NVIDIA driver here \(libcuda.so.1\)$"),
        (nvidia.Driver("13.0", ()), 0, "and the NVIDIA driver finds no GPU$"),
        (nvidia.Driver("13.0", (H100,)), 1, "there is no GPU 1: this machine has 1"),
        (
            nvidia.Driver("12.0", (nvidia.Gpu("Tesla V100", (7, 0), 16 * 10**9),)),
            0,
            "for cuda:sm_80,sm_90a, and Tesla V100 has compute capability 7.0: compile the model",
        ),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, driver: nvidia.Driver | None, index: int, words: str
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: driver)
    with pytest.raises(TargetError, match=words):
        arch_for(CODE, index)


def test_the_newest_code_that_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", (H100,)))
    assert arch_for(CODE, 0) == "sm_90a"
    ada = replace(H100, capability=(8, 9))
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", (ada,)))
    assert arch_for(CODE, 0) == "sm_80"


def test_an_artifact_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = moec.compile(
        torch.nn.Linear(8, 8),
        (torch.zeros(2, 8),),
        target="cuda:sm_80",
        backend=CUDA_TEXT,
        verify=False,
    )
    path = tmp_path / "linear.moec"
    made.save(path)
    read = artifact.read(path)
    assert made.package is not None
    assert read.package.gpu == made.package.gpu
    assert read.package.gpu is not None
    assert b"__global__" in read.package.gpu.parts["kernels.cu"]
    assert artifact.read(path, native=False).package.library == b""
    monkeypatch.setattr(nvidia, "driver", lambda: None)
    with pytest.raises(TargetError, match="its kernels are for cuda:sm_80, and there is no NVIDIA"):
        moec.load(path)
