"""What is known of tensors beyond their types, while a module is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from moec.capture.speculate.sums import Sums

Recipe = Callable[[torch.Tensor], torch.Tensor]
Truth = Literal["count", "some", "none"]


@dataclass(eq=False)
class ClassChoice:
    """A choice among `classes`, such as the experts of all tokens.

    `sorted`: the flat ids whose sort order is used. `rows`: where those are each class, one list
    a class.
    """

    classes: int
    sorted: torch.Tensor | None = None
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """A function of the order that sorts a choice: `recipe` makes its values from any places."""

    choice: ClassChoice
    recipe: Recipe


@dataclass(frozen=True)
class Member:
    """`ids == expert`, of a choice."""

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
    """choice: the values are classes of it. high: none is greater. distinct: no two along the last
    axis are equal. single: along this axis at most one is not 0. sums: what the values are sums of.
    hot: along the last axis stand the classes of this choice, and over the others their sum is how
    often each is chosen, of so many times. order: the values are rows in the order that sorts a
    choice. size: a 0-d tensor that holds this number. truth: what a bool of it asks.
    greatest: read into Python it is this upper bound. member: the values are `ids == expert`.
    piece: which rows of a buffer these are. column: the rows that stand in a matrix of one column,
    or are repeated along the features. elements: the same values, as Python has read them.
    one_hot_of: the ids whose one-hot rows these are, of as many classes as the data say.
    """

    choice: ClassChoice | None = None
    high: Any = None
    distinct: bool = False
    single: int | None = None
    sums: Sums | None = None
    hot: tuple[ClassChoice, Any] | None = None
    order: Order | None = None
    size: Any = None
    truth: Truth | None = None
    greatest: Any = None
    member: Member | None = None
    piece: Piece | None = None
    column: torch.Tensor | None = None
    elements: tuple[Any, ...] | None = None
    one_hot_of: torch.Tensor | None = None


NOTHING = Fact()


class Facts:
    """Facts by tensor. Tensors are held, lest another gets the id of one that is gone."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.Tensor, Fact]] = {}

    def of(self, value: Any) -> Fact:
        return self._held[id(value)][1] if id(value) in self._held else NOTHING

    def note(self, value: Any, **changes: Any) -> Any:
        """`value`, of which `changes` are known from now on."""
        if isinstance(value, torch.Tensor):
            self._held[id(value)] = (value, replace(self.of(value), **changes))
        return value

    def forget(self, value: Any) -> None:
        """Nothing holds any longer of the values of a tensor that was written, nor of those of
        views of its memory; which rows of a buffer they are stays so."""
        if not isinstance(value, torch.Tensor) or not self._held:
            return
        memory = value.untyped_storage()._cdata
        for key, (tensor, fact) in list(self._held.items()):
            if tensor is value or tensor.untyped_storage()._cdata == memory:
                self._held[key] = (tensor, Fact(piece=fact.piece))
