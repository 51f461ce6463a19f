"""`moec run --memory`, in processes of their own: what a process takes counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.runtime.call.routing_trace import of_ids, save_trace
from tests.once import Once

EXPERTS, WIDTH = 16, 512


class Layer(torch.nn.Module):
    """64 MiB of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w = torch.nn.Parameter(torch.randn(EXPERTS, 2048, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(self.router(x).softmax(-1), 2)
        rows = torch.einsum("td,tkhd->tkh", x, self.w[ids])
        return (rows * weights[..., None]).sum(1)


@pytest.fixture(scope="session")
def folder(once: Once) -> Path:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = moec.compile(Layer(), (torch.randn(6, WIDTH),), store=True, verify=False)
        model.save(folder / "layer.moec")
        np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((40, WIDTH), np.float32))

    return once("stored-64-mib", write)


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["run", str(folder / "layer.moec"), "-i", str(folder / "x.npy"), *more]
    words = [sys.executable, "-m", "moec", *command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def least(folder: Path) -> int:
    """MB with which the model runs."""
    result = run(folder, "--memory", "1MiB")
    assert result.returncode == 1
    needed = re.search(r"memory is 1\.0 MB, and this model needs ([\d.]+) MB", result.stderr)
    assert needed, result.stderr
    return round(float(needed[1]))


def test_a_run_within_a_limit(folder, tmp_path):
    limit = f"{least(folder) + 20}MB"
    outputs = [tmp_path / "all.npy", tmp_path / "some.npy"]
    assert run(folder, "-o", str(outputs[0])).returncode == 0
    result = run(folder, "-o", str(outputs[1]), "--memory", limit, "--json")
    assert result.returncode == 0, result.stderr
    store = json.loads(result.stdout)["store"]
    assert 1 < store["slots"][0] < EXPERTS
    assert store["counts"]["bytes_read"] >= store["expert_bytes"] - store["slot_bytes"]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert "of 67.1 MB of experts in memory" in run(folder, "--memory", limit).stderr
    assert peak(folder, "--memory", limit) <= 10**6 * int(limit.removesuffix("MB"))


def test_a_limit_counts_libraries_before_they_are_loaded(folder):
    """TVM's, of 12 MB; here all but 6 MB would fit."""
    experts = 67 * (EXPERTS - 1) // EXPERTS
    result = run(folder, "--memory", f"{least(folder) + experts - 6}MB", "--json")
    assert json.loads(result.stdout)["store"]["slots"][0] < EXPERTS


PEAK = """
import atexit, pathlib, runpy, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0]))
sys.argv[0] = "moec"
runpy.run_module("moec", run_name="__main__")
"""


def peak(folder: Path, *more: str) -> int:
    """The most bytes that a run has in memory."""
    command = ["run", str(folder / "layer.moec"), "-i", str(folder / "x.npy"), "-q", *more]
    words = [sys.executable, "-c", PEAK, *command]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return 1024 * int(result.stdout)


def test_routing_chooses_the_policy(folder, tmp_path):
    ids = np.random.default_rng(0).integers(EXPERTS, size=(100, 1, 2))
    save_trace(of_ids(ids, EXPERTS), tmp_path / "t.npz")
    more = ("--routing", str(tmp_path / "t.npz"))
    result = run(folder, "--memory", f"{least(folder) + 20}MB", *more, "--json")
    assert result.returncode == 0, result.stderr
    assert "--routing chooses what --memory holds: give both" in run(folder, *more).stderr


def test_recording_needs_all_experts(folder, tmp_path):
    result = run(folder, "--memory", "1GiB", "--record-routing", str(tmp_path / "t.npz"))
    assert "--record-routing needs all experts in memory: leave --memory out" in result.stderr
