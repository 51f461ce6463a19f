"""What a module returns comes back as it was, whatever it is nested in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.interpret.outputs import flatten


@dataclass(frozen=True)
class Record:
    hidden: torch.Tensor
    loss: float
    more: tuple[Any, ...]
    none: None = None


def test_a_record_comes_back_as_it_was() -> None:
    record = Record(torch.ones(2), 0.5, (torch.zeros(1), {"k": torch.ones(3)}))
    tensors, structure = flatten(record)
    assert [len(t) for t in tensors] == [2, 1, 3]
    assert structure.names == ("hidden", "more_0", "more_1")
    assert structure.constants == ("loss is always 0.5",)
    back = structure.rebuild([1, 2, 3])
    assert back == Record(1, 0.5, (2, {"k": 3}))  # type: ignore[arg-type]


def test_containers_and_constants() -> None:
    tensors, structure = flatten([torch.ones(1), None, {"x": (torch.ones(2), 7)}])
    assert structure.count == len(tensors) == 2
    assert structure.constants == ("2.x.1 is always 7",)
    assert structure.rebuild(["a", "b"]) == ["a", None, {"x": ("b", 7)}]


def test_one_tensor_is_the_output() -> None:
    tensors, structure = flatten(torch.ones(3))
    assert structure.names == ("output",)
    assert structure.rebuild(tensors) is tensors[0]
