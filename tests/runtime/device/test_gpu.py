"""Models on GPUs, without a GPU: a fake driver and emulated kernels.

An artifact for CPUs and GPUs is compiled once, by a fake nvcc that stores the CUDA C as machine
code, so the path from `moec run --device cuda:0` to the launch is the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import moec
from moec import __main__ as front
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.errors import ArtifactError, Exit, InputError, MoecError, TargetError, UsageError
from moec.runtime.artifact import artifact
from moec.runtime.checks import check_inputs
from moec.runtime.device import gpu
from moec.runtime.device.device import device_of
from moec.runtime.device.library import CPU, tvm_ffi
from moec.runtime.package import Function, Launch, Port
from moec.target import nvidia
from tests.command_line import invoke
from tests.cuda_emulator.emulate import imported

BOTH = "cpu,cuda:sm_80,sm_90a"
FACTORY = """
from collections import OrderedDict
import torch

def make():
    torch.manual_seed(1)
    layers = {"norm": torch.nn.LayerNorm(8), "head": torch.nn.Linear(8, 4)}
    return torch.nn.Sequential(OrderedDict(layers)), (torch.zeros(2, 8),)
"""
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
while [ $# -gt 0 ]; do
  case "$1" in *.cu) source="$1";; -o) output="$2";; esac
  shift
done
cp "$source" "$output"
"""


@dataclass(frozen=True)
class Example:
    path: Path
    code: Path  # what --emit wrote
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("gpu")
    (factory := folder / "linear.py").write_text(FACTORY)
    (nvcc := folder / "nvcc").write_text(NVCC)
    nvcc.chmod(0o755)
    path, code = folder / "linear.moec", folder / "code"
    arguments = [f"{factory}:make", "-o", str(path), "--target", BOTH, "--emit", str(code)]
    runner = CliRunner(env={"CUDA_HOME": "", "PATH": f"{folder}:{os.environ['PATH']}"})
    result = runner.invoke(front.cli, ["compile", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "code for cuda:sm_80,sm_90a is included, and was not verified" in result.output
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    x = torch.arange(24.0).reshape(3, 8).sin()
    return Example(path, code, x.numpy(), model(x).detach().numpy())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(source), "-o", str(path)], check=True)
    return str(path)


@pytest.fixture
def driver(library: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(nvidia, "LIBRARY", library)
    nvidia.driver.cache_clear()
    yield monkeypatch
    nvidia.driver.cache_clear()


@pytest.fixture
def emulation(driver: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU whose memory is the CPU's, and whose kernels are emulated."""

    def join(host: Any, code: gpu.GpuCode, part: str) -> None:
        imported(host, code.parts[part].decode(), code.launches[part.partition(".")[0]])

    driver.setattr(gpu, "GpuDevice", partial(gpu.GpuDevice, memory=CPU))
    driver.setattr(gpu, "load_runtime", lambda: None)
    driver.setattr(gpu, "import_kernels", join)
    return driver


# ---- one artifact with code for both --------------------------------------------------------


def test_a_cpu_runs_it_and_imports_nothing_of_gpus(example: Example, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=example.x)
    program = f"""
import sys
from moec.__main__ import main
sys.argv[1:] = ["run", {str(example.path)!r}, "--check", "-i", "x.npz", "-o", "y.npz"]
try:
    main()
except SystemExit as end:
    assert not end.code
names = [n for n in sys.modules if "gpu" in n or "cuda" in n or "nvidia" in n or n == "torch"]
assert not names, names
"""
    # PyTorch and the compiler stay out too, as of any artifact.
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    (y,) = np.load(tmp_path / "y.npz").values()
    np.testing.assert_allclose(y, example.y, rtol=1e-5)


def test_it_says_what_it_is_for(example: Example) -> None:
    verified = invoke("verify", str(example.path))
    opened = artifact.read(example.path)
    assert f"for {opened.package.target.name},cuda:sm_80,sm_90a" in verified.output
    assert opened.for_gpu is not None
    assert opened.for_gpu.gpu is not None
    assert opened.for_gpu.gpu.toolkit == "13.0.88"
    assert opened.for_gpu.library == b""
    without = artifact.read(example.path, native=False)
    assert without.for_gpu is not None
    assert [p.has_code for p in (opened.for_gpu, without.for_gpu)] == [True, False]


def test_weights_of_one_layout_are_stored_once(example: Example) -> None:
    manifest = artifact.read(example.path).manifest
    assert manifest.for_gpu is not None
    parts = [a.part for a in (*manifest.arrays.values(), *manifest.for_gpu.arrays.values())]
    assert len(set(parts)) < len(parts)


def test_an_altered_weight_of_a_gpu_is_found(example: Example, tmp_path: Path) -> None:
    opened = artifact.read(example.path)
    assert opened.for_gpu is not None
    path = tmp_path / "folder"
    artifact.write(opened.package, path, graphs=opened.graphs, folder=True, for_gpu=opened.for_gpu)
    manifest = artifact.read(path).manifest
    assert manifest.for_gpu is not None
    alone = {a.part for a in manifest.for_gpu.arrays.values()} - {
        a.part for a in manifest.arrays.values()
    }
    for part in alone or {"kernels/gpu/sm_80.so"}:
        content = bytearray((path / part).read_bytes())
        content[-1] ^= 1
        (path / part).write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered: its SHA-256 differs"):
        artifact.read(path).verify()


def test_a_library_of_a_gpu_that_is_none_is_refused(example: Example, tmp_path: Path) -> None:
    opened = artifact.read(example.path)
    assert opened.for_gpu is not None
    assert opened.for_gpu.gpu is not None
    parts = {**opened.for_gpu.gpu.parts, "sm_80.so": b"not one"}
    changed = replace(opened.for_gpu, gpu=replace(opened.for_gpu.gpu, parts=parts))
    path = tmp_path / "changed.moec"
    artifact.write(opened.package, path, graphs=opened.graphs, for_gpu=changed)
    with pytest.raises(ArtifactError, match=r"kernels/gpu/sm_80\.so is not a library for"):
        artifact.read(path)


def test_the_code_is_written_into_a_folder(example: Example) -> None:
    names = {path.name for path in example.code.iterdir()}
    codes = {f"{arch}.{part}" for arch in ("sm_80", "sm_90", "sm_90a") for part in ("cu", "so")}
    assert names == codes | {"sm_80.cubin", "sm_90a.cubin", "sm_90.ptx"}
    for name, source in (("sm_80.cubin", "sm_80.cu"), ("sm_90.ptx", "sm_90.cu")):
        text = (example.code / source).read_text()
        assert "__global__" in text
        assert (example.code / name).read_text() == text  # by the stand-in
    words = invoke("compile", "x", "-o", "y", "--force", "--emit", "z")
    assert "--emit writes GPU code: give -o and a GPU" in words.output


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu,cuda:sm_70", "unknown target 'cuda:sm_70'"),
        ("null,cuda:sm_80", "'null' generates no code that could be combined with it"),
        ("cuda:sm_80,cuda:sm_90a", "unknown target 'cuda:sm_80'"),
    ],
)
def test_targets_that_do_not_go_together(target: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        moec.compile(torch.nn.Linear(8, 8), (torch.zeros(2, 8),), target=target, verify=False)


def test_experts_of_a_gpu_are_not_read_from_disk(example: Example) -> None:
    with pytest.raises(UsageError, match="--store reads experts from disk on a CPU, not on a GPU"):
        moec.compile(
            torch.nn.Linear(8, 8), (torch.zeros(2, 8),), target="cuda:sm_80", store=True,
            verify=False, backend=CUDA_TEXT,
        )  # fmt: skip
    with pytest.raises(UsageError, match="--memory limits a model on a CPU, and this one is on a"):
        moec.load(example.path, device="cuda", memory="1GiB")


# ---- on a GPU -------------------------------------------------------------------------------


def test_run_copies_to_the_gpu_and_back(
    example: Example, tmp_path: Path, emulation: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", input=example.x)
    out = tmp_path / "y.npz"
    arguments = [str(example.path), "--device", "cuda:0", "-i", f"{tmp_path}/x.npz", "-o", str(out)]
    result = invoke("run", *arguments, "--check")
    assert result.exit_code == 0, result.output
    assert "1 sample agrees" in result.output
    (y,) = np.load(out).values()
    np.testing.assert_allclose(y, example.y, rtol=1e-5)


def test_tensors_of_the_cpu_are_copied_only_if_that_is_asked_for(
    example: Example, emulation: pytest.MonkeyPatch
) -> None:
    x = torch.from_numpy(example.x)
    copying = moec.load(example.path, device="cuda", copies=True)
    torch.testing.assert_close(copying(x), torch.from_numpy(example.y))
    model = moec.load(example.path, device="cuda")
    with pytest.raises(
        InputError, match="'input' is on cpu, and the model runs on cuda:0: give it tensors of "
    ):
        model(x)


def test_weights_that_do_not_fit_are_refused_with_the_number(
    example: Example, emulation: pytest.MonkeyPatch
) -> None:
    emulation.setenv("FAKE_CUDA_FREE", "100")
    with pytest.raises(TargetError, match="208 bytes, and 100 bytes of memory are free on GPU 0"):
        moec.load(example.path, device="cuda")


def test_outputs_that_do_not_fit_are_refused_with_the_number(
    example: Example, emulation: pytest.MonkeyPatch
) -> None:
    """Before the call: the input of this test has no memory of its size either."""
    emulation.setenv("FAKE_CUDA_FREE", "50000000")
    model = moec.load(example.path, device="cuda", copies=True)
    x = torch.zeros(1, 8).expand(5_000_000, 8)
    with pytest.raises(InputError, match=r"the outputs take 80\.0 MB, and 50\.0 MB of memory"):
        model(x)


@pytest.mark.parametrize(
    ("environment", "device", "words"),
    [
        ({"BROKEN": "1"}, "cuda", r"for cuda:sm_80,sm_90a, and there is no NVIDIA driver here"),
        ({"GPUS": "0"}, "cuda", "and the NVIDIA driver finds no GPU$"),
        ({}, "cuda:1", "there is no GPU 1: this machine has 1"),
        ({"CAPABILITY": "70"}, "cuda", "Fake GPU has compute capability 7.0: compile the model"),
        (
            {"VERSION": "12080"},
            "cuda",
            "were made by CUDA 13.0.88, and the NVIDIA driver here runs CUDA up to 12.8: install",
        ),
    ],
)
def test_what_a_machine_lacks(
    example: Example,
    driver: pytest.MonkeyPatch,
    environment: dict[str, str],
    device: str,
    words: str,
) -> None:
    for name, value in environment.items():
        driver.setenv(f"FAKE_CUDA_{name}", value)
    with pytest.raises(TargetError, match=words):
        moec.load(example.path, device=device)


def test_the_newest_code_that_a_gpu_runs(example: Example, driver: pytest.MonkeyPatch) -> None:
    code = artifact.read(example.path).for_gpu.gpu  # type: ignore[union-attr]
    assert code is not None
    parts = {"90": "sm_90a.cubin", "89": "sm_80.cubin", "100": "sm_90.ptx", "120": "sm_90.ptx"}
    for capability, part in parts.items():
        nvidia.driver.cache_clear()
        driver.setenv("FAKE_CUDA_CAPABILITY", capability)
        assert gpu.part_for(code, 0) == part


def test_ptx_of_a_newer_toolkit_than_the_driver(
    example: Example, driver: pytest.MonkeyPatch
) -> None:
    code = artifact.read(example.path).for_gpu.gpu  # type: ignore[union-attr]
    assert code is not None
    driver.setenv("FAKE_CUDA_CAPABILITY", "120")
    words = "needs the PTX of this model, of CUDA 13.1.7, and the NVIDIA driver here compiles that"
    with pytest.raises(TargetError, match=words):
        gpu.part_for(replace(code, toolkit="13.1.7"), 0)


@pytest.mark.usefixtures("driver")
def test_machine_code_of_other_kernels_is_stale(example: Example) -> None:
    code = artifact.read(example.path).for_gpu.gpu  # type: ignore[union-attr]
    assert code is not None
    with pytest.raises(
        ArtifactError, match=r"sm_90a.cubin does not fit the library: it lacks the kernel other; "
    ):
        gpu.kernels(replace(code, launches={"sm_90a": (Launch("other", (), ()),)}), "sm_90a.cubin")
    with pytest.raises(ArtifactError, match=r"sm_90a.cubin has kernels that nothing launches"):
        gpu.kernels(replace(code, launches={}), "sm_90a.cubin")


def test_no_driver_at_all(example: Example) -> None:
    """This machine has none."""
    if nvidia.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    result = invoke("run", example.path, "--device", "cuda", "--check")
    assert result.exit_code == Exit.SETUP
    assert "and there is no NVIDIA driver here (libcuda.so.1)" in result.output


def test_code_for_the_other_kind_alone(example: Example, tmp_path: Path) -> None:
    opened = artifact.read(example.path)
    assert opened.for_gpu is not None
    for package, device, words in (
        (opened.package, "cuda", "and has no code for a GPU: compile the model for both, with"),
        (opened.for_gpu, "cpu", "compiled for cuda:sm_80,sm_90a and has no code for a CPU"),
    ):
        artifact.write(package, tmp_path / "one.moec", graphs=opened.graphs)
        with pytest.raises(ArtifactError, match=words):
            moec.load(tmp_path / "one.moec", device=device)
    with pytest.raises(UsageError, match="unknown device 'gpu': name cpu, cuda or a GPU such"):
        moec.load(example.path, device="gpu")


def test_an_artifact_for_gpus_alone_keeps_its_kernels(example: Example, tmp_path: Path) -> None:
    opened = artifact.read(example.path)
    assert opened.for_gpu is not None
    artifact.write(opened.for_gpu, path := tmp_path / "gpu.moec", graphs=opened.graphs)
    read = artifact.read(path)
    assert read.package.gpu == opened.for_gpu.gpu
    assert read.for_gpu is None
    with pytest.raises(TargetError, match="are for cuda:sm_80,sm_90a, and there is no NVIDIA"):
        moec.load(path)


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("CUDA: out of memory", InputError, "GPU 1 has too little memory for this call: give"),
        ("CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS", TargetError, "GPU 1 failed: CUDALaunch"),
        ("expects x.shape[0] == 2", InputError, "the compiled code rejects these inputs"),
    ],
)
def test_failures_of_a_call(line: str, kind: type[MoecError], words: str) -> None:
    refusal = gpu.GpuDevice(1).refusal(line)
    assert type(refusal) is kind
    assert str(refusal).startswith(words)


def test_memory_of_a_device_has_the_same_numbers() -> None:
    """On the only device here, by the calls that a GPU's memory takes."""
    array = torch.arange(6.0).reshape(2, 3)
    copy = torch.from_dlpack(gpu.copied_to(tvm_ffi().from_dlpack(array), CPU, 0))
    assert torch.equal(copy, array)
    assert copy.data_ptr() != array.data_ptr()


@dataclass(frozen=True)
class OnGpu:
    """The attributes of a torch tensor."""

    device: str
    shape: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.float32


def test_tensors_on_two_devices_are_refused() -> None:
    function = Function(inputs=(Port("x", "f32", (2,)), Port("y", "f32", (2,))))
    takes = device_of("cuda:1").takes
    check_inputs(function, {"x": OnGpu("cuda:1"), "y": OnGpu("cuda:1")}, takes)
    with pytest.raises(InputError, match="'y' is on cuda:0, and the model runs on cuda:1: give it"):
        check_inputs(function, {"x": OnGpu("cuda:1"), "y": OnGpu("cuda:0")}, takes)
    with pytest.raises(InputError, match="'x' is on cpu, and the model runs on cuda:1: give it"):
        check_inputs(function, {"x": torch.zeros(2), "y": OnGpu("cuda:1")}, takes)
