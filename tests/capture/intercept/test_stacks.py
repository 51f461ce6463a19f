"""Stacks of an export's nodes: the text that torch records by itself, in less time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from moec.capture.intercept import table
from moec.capture.intercept.interceptor import intercepted
from moec.capture.intercept.table import traced_handlers
from moec.capture.user_code.sources import is_internal
from tests.capture.modules import WIDTH, Moe


class Outer(torch.nn.Module):
    """Its nodes have one frame of user code, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Moe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def recorded(*without: str) -> list[str | None]:
    """The stack of each node of an export, with what moec replaces but for these names."""
    x, module = torch.randn(5, WIDTH), Outer()
    handlers = [handler for handler in traced_handlers() if handler.name not in without]
    with intercepted(module, handlers):
        exported = torch.export.export(module, (x,), strict=False)
    return [node.meta.get("stack_trace") for node in exported.graph.nodes]


def test_stacks_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = recorded("CapturedTraceback")
    counts = Counter(text.count("in forward") for text in stacks if text)
    assert counts[2] > 20
    assert counts[1] == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("torch reads the stack of the process")

    monkeypatch.setattr("torch.utils._traceback._extract_symbolized_tb", refuse)
    assert recorded() == stacks


def test_files_of_torch_and_moec_are_internal() -> None:
    from moec.ir.interpret import graph_module as module

    files = (torch.__file__, torch.nn.functional.__file__, module.__file__, table.__file__)
    assert all(is_internal(file) for file in files)
    assert not is_internal(__file__)
