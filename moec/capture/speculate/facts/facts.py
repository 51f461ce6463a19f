"""Facts about tensors, beyond their types, that are known while a module is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moec.capture.speculate.facts.singles import Single
from moec.capture.speculate.facts.sums import ClassChoice, Counts, Sums
from moec.torch_private import address_of

Recipe = Callable[[torch.Tensor], torch.Tensor]
Truth = Literal["count", "some", "none"]


@dataclass(frozen=True)
class Order:
    """Marks a tensor as a function of the order that sorts a choice: `recipe` computes its values
    from any positions."""

    choice: ClassChoice
    recipe: Recipe


@dataclass(frozen=True)
class Member:
    """The mask `ids == expert`, where the ids are a choice."""

    ids: torch.Tensor
    expert: int


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of a buffer, along its first axis."""

    buffer: torch.Tensor
    start: Any
    stop: Any


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    choice: its values are classes of this choice.
    high: no value is greater.
    ascending: its values are in ascending order.
    distinct: no two values along the last axis are equal.
    single: along this axis, at most one value is not 0.
    zero: all its values are 0.
    sums: its values are sums of counts.
    hot: (choice, total, positive). The last axis enumerates the classes of the choice, and the sum
        over all other axes is how often each class is chosen, `total` times in all, and each of
        them at least once if `positive`.
    order: its values are rows in the order that sorts a choice.
    size: it is a 0-d tensor of this number.
    float32: it is a 0-d tensor of this number, computed of a size.
    condition: it is the result of a comparison of sizes, this one.
    truth: a "count" of rows, or a condition on it: "some" is true where there are rows, "none"
        where there are none.
    greatest: read into Python, it becomes this upper bound.
    member: it is the mask `ids == expert`.
    piece: it is these rows of a buffer.
    pieces: these counts cut it into these parts.
    column: it has these row numbers [n] as a column, or repeated along the features.
    elements: its values, as the numbers that Python has read.
    one_hot_of: it has the one-hot rows of these ids, with as many classes as the data say.
    even: each of this many classes is as often among its values as any other.
    positive: where there are rows, it has a value other than 0, and a 0-d tensor is not 0.
    always: where there are rows, this is its truth value.
    """

    choice: ClassChoice | None = None
    high: Any = None
    ascending: bool = False
    distinct: bool = False
    single: int | None = None
    zero: bool = False
    sums: Sums | None = None
    hot: tuple[ClassChoice, Any, bool] | None = None
    order: Order | None = None
    size: Any = None
    float32: Single | None = None
    condition: Any = None
    truth: Truth | None = None
    greatest: Any = None
    member: Member | None = None
    piece: Piece | None = None
    pieces: tuple[Counts, tuple[torch.Tensor, ...]] | None = None
    column: torch.Tensor | None = None
    elements: tuple[Any, ...] | None = None
    one_hot_of: torch.Tensor | None = None
    even: int | None = None
    positive: bool = False
    always: bool | None = None


NOTHING = Fact()


class Facts:
    """Facts by tensor. Holds the tensors, since a new one could reuse the id of a freed one."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.Tensor, Fact]] = {}

    def of(self, value: Any) -> Fact:
        return self._held[id(value)][1] if id(value) in self._held else NOTHING

    def note(self, value: Any, **changes: Any) -> Any:
        """Returns `value`, with `changes` added to its facts."""
        if isinstance(value, torch.Tensor):
            self._held[id(value)] = (value, replace(self.of(value), **changes))
        return value

    def forget(self, value: Any) -> None:
        """Removes the facts about the values of a tensor that is written in place, and of all views
        of its memory. Which rows of a buffer they are does not change."""
        if not isinstance(value, torch.Tensor) or not self._held:
            return
        memory = address_of(value.untyped_storage())
        for key, (tensor, fact) in list(self._held.items()):
            if tensor is value or address_of(tensor.untyped_storage()) == memory:
                self._held[key] = (tensor, Fact(piece=fact.piece))
