"""Kernels of GPUs at load: what this machine lacks is said in one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import moec
from moec import __main__ as front
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.errors import InputError, TargetError
from moec.runtime import artifact
from moec.runtime.checks import check_inputs
from moec.runtime.gpu import arch_for, copied_to
from moec.runtime.library import CPU, tvm_ffi
from moec.runtime.package import Function, GpuCode, Port
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
    verified = CliRunner().invoke(front.cli, ["verify", str(path)])
    assert "functions main, for cuda:sm_80" in verified.output
    monkeypatch.setattr(nvidia, "driver", lambda: None)
    with pytest.raises(
        TargetError, match="of this model are for cuda:sm_80, and there is no NVIDIA"
    ):
        moec.load(path)


def test_the_code_is_written_into_a_folder(tmp_path: Path) -> None:
    """By a stand-in for nvcc, which leaves the CUDA C as the machine code."""
    factory = tmp_path / "linear.py"
    factory.write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(8, 8), (torch.zeros(2, 8),)\n"
    )
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    out, folder = tmp_path / "linear.moec", tmp_path / "code"
    arguments = [f"{factory}:make", "-o", str(out), "--target", "cuda:sm_80,sm_90a"]
    runner = CliRunner(env={"CUDA_HOME": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    options = ["--verify", "off", "--emit", str(folder), "--quiet"]
    result = runner.invoke(front.cli, ["compile", *arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names = ["kernels.cu", "sm_80.cubin", "sm_90a.cubin"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "__global__" in (folder / "kernels.cu").read_text()
    assert (folder / "sm_90a.cubin").read_bytes() == (folder / "kernels.cu").read_bytes()
    words = runner.invoke(front.cli, ["compile", "x", "-o", str(out), "--force", "--emit", "y"])
    assert "--emit writes the code of a GPU" in words.output


def test_memory_of_a_device_has_the_same_numbers() -> None:
    """On the only device here, by the calls that a GPU's memory takes."""
    array = torch.arange(6.0).reshape(2, 3)
    copy = torch.from_dlpack(copied_to(tvm_ffi().from_dlpack(array), CPU))
    assert torch.equal(copy, array)
    assert copy.data_ptr() != array.data_ptr()


def test_a_tensor_on_the_wrong_device_is_refused() -> None:
    function = Function(inputs=(Port("x", "f32", (2,)),))
    with pytest.raises(InputError, match="'x' is on cpu, and the model runs on a GPU: give it"):
        check_inputs(function, {"x": torch.zeros(2)}, "cuda")


NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
while [ $# -gt 0 ]; do
  case "$1" in *.cu) source="$1";; -o) output="$2";; esac
  shift
done
cp "$source" "$output"
"""
