"""Stacks of an export's nodes: the text that torch records by itself, in less time."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from moec.capture.sizes.guards import located
from moec.capture.user_code.sources import is_internal
from moec.capture.user_code.stacks import short_stacks
from tests.capture.modules import WIDTH, Moe


class Outer(torch.nn.Module):
    """Its nodes have one frame of user code, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Moe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def recorded(stacks: Any) -> list[str | None]:
    """The stack of each node of an export."""
    x = torch.randn(5, WIDTH)
    with located(), stacks:
        exported = torch.export.export(Outer(), (x,), strict=False)
    return [node.meta.get("stack_trace") for node in exported.graph.nodes]


def test_stacks_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = recorded(nullcontext())
    counts = Counter(text.count("in forward") for text in stacks if text)
    assert counts[2] > 20
    assert counts[1] == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("torch reads the stack of the process")

    monkeypatch.setattr("torch.utils._traceback._extract_symbolized_tb", refuse)
    assert recorded(short_stacks()) == stacks


def test_files_of_torch_and_moec_are_internal() -> None:
    from moec.capture.user_code import stacks
    from moec.interpret import graph_module as module

    files = (torch.__file__, torch.nn.functional.__file__, module.__file__, stacks.__file__)
    assert all(is_internal(file) for file in files)
    assert not is_internal(__file__)
