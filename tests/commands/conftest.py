"""A fake compiler, so that commands are tested without compiling."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moec import model_path
from moec.capture.source import Source
from moec.ir.graph import Program, Stage
from moec.passes.core.runner import PassResult
from moec.report.report import Report
from tests.commands import models


@dataclass
class FakeCompiler:
    """A fake moec.api; `asked` has the arguments of the last compilation."""

    request: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    fails_in: str = "verify"

    def compile(self, model: str, **options: Any) -> FakeCompiled:
        self.request = {"model": model, **options}
        program = Program(models.graph(), models.weights(models.graph()))
        pass_results = [
            PassResult("capture", program, Stage.ATEN, 0.0, 0, ()),
            PassResult("recognise", program, Stage.MOE, 0.25, 3, ()),
        ]
        for phase in ("capture", "passes", "kernels", "verify"):
            options["progress"](phase)
            if self.error and phase == self.fails_in:
                raise self.error
            if phase == "passes" and (watch := options.get("watch")):
                for pass_result in pass_results:
                    watch(pass_result)
        return FakeCompiled(pass_results)


@dataclass
class FakeCompiled:
    pass_results: list[PassResult]
    target: None = None
    source: Source = field(default_factory=lambda: Source(torch.nn.Identity()))

    def report(self) -> Report:
        return models.report()

    def save(self, path: Path, overwrite: bool = True, keep_passes: bool = False) -> None:
        path.write_text("artifact with passes" if keep_passes else "artifact")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    module = types.ModuleType("moec.api")
    module.compile = fake.compile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moec.api", module)
    importlib.import_module("moec.capture.doors")  # which would keep the function of a moment
    monkeypatch.setattr(model_path, "kind_of_model", lambda text: "checkpoint")
    return fake
