"""The results of a module are returned with their original nesting."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers.utils import ModelOutput

from moec.errors import CaptureError
from moec.ir.interpret.outputs import checked, flatten


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


class Pair(NamedTuple):
    hidden: Any
    more: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    hidden: Any
    loss: float = 1.5


class Keys(dict[str, Any]):
    """A dict of its own."""


@dataclass
class Scores(ModelOutput):
    hidden: Any = None
    more: Any = None


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (Pair(torch.ones(1), [None, Pair(torch.ones(2), "s")]), ("hidden", "more")),
        (Slotted(torch.ones(1)), ("hidden",)),
        (Keys(hidden=torch.ones(1), k=2), ("hidden",)),
        (UserDict(hidden=torch.ones(1)), ("hidden",)),
        (OrderedDict(b=torch.ones(1), a=torch.ones(2)), ("b", "a")),
        (SimpleNamespace(hidden=torch.ones(1), k=2), ("hidden",)),
        (Scores(hidden=torch.ones(1), more=(torch.ones(2), None)), ("hidden", "more")),
        (torch.ones(2, 3).topk(2), ("output_0", "output_1")),
        ((), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds(result: Any, names: tuple[str, ...]) -> None:
    tensors, structure = flatten(result)
    assert checked(structure).names == names
    back = structure.rebuild(tensors)
    assert type(back) is type(result)
    again, same = flatten(back)
    assert all(a is b for a, b in zip(again, tensors, strict=True))
    assert repr(same.template) == repr(structure.template)
    assert same.constants == structure.constants


def test_the_result_of_the_capture_is_not_changed() -> None:
    for result in (Slotted(torch.ones(1)), Keys(k=torch.ones(1)), Scores(hidden=torch.ones(1))):
        before = repr(result)
        flatten(result)[1].rebuild([7])
        assert repr(result) == before


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (
            (torch.ones(1), object()),
            ("output 1 is a object, which may not contain tensors of a result"),
        ),
        (
            {"a": [{1, 2}]},
            r"output a\.0 is a set, which may not contain tensors of a result",
        ),
        (iter([torch.ones(1)]), "the output is a list_iterator"),
    ],
)
def test_what_cannot_come_back_is_refused(result: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        checked(flatten(result)[1])
