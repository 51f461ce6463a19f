"""The cost of a compilation is estimated from bytes and from missing kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moec
from moec.commands.compilation import estimate
from moec.model.compiled import CompiledModel


def not_built(target: str = "generic") -> CompiledModel:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    return moec.compile(module, (torch.zeros(3, 8),), target=target, build=False, verify=False)


def test_kernels_that_the_cache_has_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    model = not_built()
    cold = estimate.of_model(model, 2, 288)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    moec.compile(module, (torch.zeros(3, 8),), target="generic", verify=False)
    warm = estimate.of_model(model, 2, 288)
    (missing, count), (left, same) = map(numbers, (cold, warm))
    assert missing == count == same
    # Two captures in one process may number what they hold otherwise, and a kernel with it.
    assert left < count
    assert cold.startswith("a compilation takes about ")


def numbers(line: str) -> tuple[int, int]:
    match = re.search(r"(\d+) of (\d+) kernels of the forward pass are not in the cache$", line)
    assert match is not None
    return int(match[1]), int(match[2])


def test_memory_grows_with_the_weights() -> None:
    assert estimate.memory(3_000_000) == "about 995.0 MB of memory"
    assert estimate.memory(10**9) == "about 6.0 GB of memory"


def test_a_target_without_kernels() -> None:
    assert estimate.of_model(not_built("null"), 2, 0) == (
        "a compilation needs about 980.0 MB of memory"
    )
