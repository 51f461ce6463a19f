"""What the tests of the page share: a model with a declined block, an artifact, its routing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import moec
from moec.runtime.call.routing_trace import save_trace
from tests.inspect.exploration.modules import stack
from tests.once import Once


@dataclass(frozen=True)
class Files:
    """tiny_moe as an artifact, a trace of it, and a profile."""

    artifact: Path
    trace: Path
    profile: Path


@pytest.fixture(scope="session")
def files(once: Once, tiny_moe: Path) -> Files:
    def write(folder: Path) -> None:
        moec.compile(tiny_moe, record_routing=True, verify="quick").save(folder / "tiny.moec")
        model = moec.load(folder / "tiny.moec")
        with model.record_routing() as recorder:
            model.generate("def read_lines(path):", max_new_tokens=8)
        save_trace(recorder.trace(), folder / "t.npz")
        profile = model.profile(prompt_tokens=16, new_tokens=3, rounds=2)
        (folder / "profile.json").write_text(json.dumps(profile.to_dict()))

    folder = once("explored", write)
    return Files(folder / "tiny.moec", folder / "t.npz", folder / "profile.json")


@pytest.fixture(scope="session")
def declined() -> moec.CompiledModel:
    """The model with a declined block, after all passes."""
    module, arguments = stack()
    return moec.compile(module, arguments, verify=False, stop_after="fold-permutes")
