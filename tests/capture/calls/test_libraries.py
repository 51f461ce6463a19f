"""Globals of installed packages: a registry of a library's is its own, a counter of the module's
package is the module's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.ir.interpret.evaluate import evaluate

PACKAGE = """
import torch


class Registry:
    def __init__(self, backends):
        self.backends = backends

    def get(self):
        return Registry(dict(self.backends)), self.backends["torch"]


registry = Registry({"torch": torch})


def backend():
    global registry
    registry, backend = registry.get()
    return backend


class Layer(torch.nn.Module):
    def forward(self, x):
        return backend().relu(x)
"""
X = torch.randn(3, 4)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An installed package with a registry, which every call replaces by an equal one."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "backends_for_tests.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("backends_for_tests")
    del sys.modules["backends_for_tests"]


class UsesRegistry(nn.Module):
    def __init__(self, package: ModuleType) -> None:
        super().__init__()
        self.linear, self.backend = nn.Linear(4, 4), package.backend

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.backend().relu(self.linear(x))
        return result


def test_a_registry_of_a_library_is_its_own(package: ModuleType) -> None:
    module = UsesRegistry(package).eval()
    captured = moec.compile(module, (X,), build=False).captured
    x = torch.randn(7, 4)
    (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
    torch.testing.assert_close(actual, module(x))


def test_globals_of_the_modules_package_are_its_state(package: ModuleType) -> None:
    registry = package.registry
    slots = earlier_calls(package.Layer(), (X,), {}).slots
    assert "the global registry" in {slot.words for slot in slots}
    assert package.registry is registry
