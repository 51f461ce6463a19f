"""Tables of a size are computed for every size, wherever the module keeps them; a size that is a
key is refused."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

TABLES: dict[Any, Tensor] = {}
TABLE: Tensor | None = None


def positions(length: int) -> Tensor:
    return torch.arange(length)[:, None] * 0.5


@functools.lru_cache(maxsize=8)
def cached(length: int, dtype: torch.dtype) -> Tensor:
    return positions(length).to(dtype)


class Keyed(nn.Module):
    tables: dict[Any, Tensor] = {}  # noqa: RUF012
    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[Any, Tensor] = {}
        self.recent: OrderedDict[int, Tensor] = OrderedDict()
        self.scales = {9: 2.0, 11: 3.0}


class OfInstance(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape[0], str(x.device), x.dtype)
        if key not in self.held:
            self.held[key] = positions(x.shape[0])
        return x + self.held[key]


class OfClass(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] not in self.tables:
            self.tables[x.shape[0]] = positions(x.shape[0])
        return x + self.tables[x.shape[0]]


class ClassAttribute(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        if ClassAttribute.table is None or len(ClassAttribute.table) < len(x):
            ClassAttribute.table = positions(len(x))
        return x + ClassAttribute.table[: len(x)]


class Global(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + TABLES[x.shape[0]]
        except KeyError:
            TABLES[x.shape[0]] = positions(x.shape[0])
        return x + TABLES[x.shape[0]]


class GlobalTensor(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        global TABLE
        if TABLE is None or len(TABLE) < len(x):
            TABLE = positions(len(x))
        return x + TABLE[: len(x)]


class Recent(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[0]
        if length in self.recent:
            self.recent.move_to_end(length)
        else:
            self.recent[length] = positions(length)
            while len(self.recent) > 2:
                self.recent.popitem(last=False)
        return x + self.recent[length]


class Function(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        return x + cached(x.shape[0], x.dtype)


class Constant(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        return x + cached(1, x.dtype)


class Method(Keyed):
    @functools.lru_cache(maxsize=2)  # noqa: B019
    def positions(self, length: int) -> Tensor:
        return positions(length)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(x.shape[0])


class Property(Keyed):
    @functools.cached_property
    def channels(self) -> Tensor:
        return torch.arange(4) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channels


class Registered(Keyed):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "positions") or len(self.positions) < len(x):
            self.register_buffer("positions", positions(len(x)), persistent=False)
        return x + self.positions[: len(x)]


class Seen(Keyed):
    """Warns once for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = {3}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] not in self.seen:
            self.seen.add(x.shape[0])
            print("a new length")
        return x + len(x)


class Chosen(Keyed):
    """A table of the user's, which has some sizes only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] in self.scales:
            return x * self.scales[x.shape[0]]
        return x + 1


KINDS = (ClassAttribute, GlobalTensor, Function, Constant, Method, Property, Registered)


def values(module: nn.Module) -> str:
    parts = [vars(module), vars(type(module)), Keyed.tables, TABLES, TABLE, module._buffers]
    return repr(parts)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_computed_at_every_size_and_the_module_is_as_it_was(
    kind: Any, called: bool
) -> None:
    module = kind().eval()
    if called:
        module(torch.randn(7, 4))
    before, cached_before = values(module), cached.cache_info().currsize
    compiled = moec.compile(module, (torch.randn(5, 4),), verify=False, build=False)
    assert values(module) == before
    program = compiled.captured.program
    for length in (1, 3, 5, 7, 9, 11, 40):
        bounds = program.graph.bounds["T"]
        if length < bounds.low or (bounds.high is not None and length > bounds.high):
            continue
        x = torch.randn(length, 4)
        (actual,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(actual, kind()(x))
    assert cached.cache_info().currsize >= cached_before


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (OfInstance, "if key not in self.held:"),
        (OfClass, "if x.shape[0] not in self.tables:"),
        (Global, "return x + TABLES[x.shape[0]]"),
        (Recent, "if length in self.recent:"),
        (Seen, "if x.shape[0] not in self.seen:"),
        (Chosen, "if x.shape[0] in self.scales:"),
    ],
)
def test_a_size_that_is_a_key_is_refused_with_its_line(kind: Any, line: str) -> None:
    with pytest.raises(CaptureError, match="a size that varies is a key of a dict") as refusal:
        moec.compile(kind(), (torch.randn(5, 4),), verify=False, build=False)
    assert line in str(refusal.value)
