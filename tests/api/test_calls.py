"""Calls bind as those of the module's forward; what the example fixed is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.capture import capture
from moec.errors import InputError
from moec.ir.interpret.graph_module import GraphModule

X, P, Q = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    def forward(
        self, x: Tensor, prior: Tensor | None = None, penalty: Tensor | None = None, k: int = 2
    ) -> Tensor:
        y = x * k
        if prior is not None:
            y = y + prior
        return y if penalty is None else y - 2 * penalty


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Settings:
    a: Tensor
    b: Tensor
    k: int = 3


class Nested(nn.Module):
    def forward(self, x: Tensor, pair: Any) -> Tensor:
        a, b = (pair["a"], pair["b"]) if isinstance(pair, dict) else (pair.a, pair.b)
        return x * a + b * getattr(pair, "k", 1)


@functools.cache
def compiled(module: type[nn.Module], door: str, *named: str) -> Callable[..., Any]:
    values_by_name = {"penalty": Q, "k": 3, "dict": {"a": P, "b": Q}}
    values_by_name |= {"tuple": Pair(P, Q), "dataclass": Settings(P, Q)}
    values = {name if module is Decoder else "pair": values_by_name[name] for name in named}
    if door == "graph":  # what moec.transform returns
        held = capture(module().eval(), (X,), values)
        structure, signature = held.structure, held.signature
        return GraphModule(held.program, {}, ((X,), values), structure, signature=signature)
    return moec.compile(module().eval(), (X,), values, verify=False)


DOORS = pytest.mark.parametrize("door", ["compile", "graph"])


@DOORS
def test_arguments_have_the_places_of_the_forward(door: str) -> None:
    model, eager = compiled(Decoder, door, "penalty"), Decoder()
    for args, kwargs in (
        ((X, None, Q), {}),
        ((X, None, Q, 2), {}),
        ((X,), {"penalty": Q}),
        ((X,), {"penalty": Q, "prior": None}),
        ((), {"penalty": Q, "x": X, "k": 2}),
    ):
        torch.testing.assert_close(model(*args, **kwargs), eager(*args, **kwargs))


@DOORS
@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X, Q), {}, "argument prior is None in the compiled model, as in its example, and a"),
        ((X, P, Q), {}, "argument prior is None in the compiled model"),
        ((X, None, Q, 4), {}, "argument k is 2 in the compiled model, .* and 4 in this call"),
        ((X, None, Q, 2.0), {}, "argument k is 2 in the compiled model, .* and 2.0 in this call"),
        ((X,), {}, "input penalty is missing|input 'penalty' is missing"),
        ((X, None, None), {}, "input penalty is missing|input 'penalty' is missing"),
    ],
)
def test_what_the_example_fixed(door: str, args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compiled(Decoder, door, "penalty")(*args, **kwargs)


@DOORS
def test_a_value_that_is_not_the_default(door: str) -> None:
    model = compiled(Decoder, door, "penalty", "k")
    torch.testing.assert_close(model(X, penalty=Q, k=3), Decoder()(X, penalty=Q, k=3))
    for kwargs in ({"k": 4}, {}):  # without it eager takes 2
        with pytest.raises(InputError, match="argument k is 3 in the compiled model"):
            model(X, penalty=Q, **kwargs)


def test_the_report_lists_fixed_arguments() -> None:
    model: Any = compiled(Decoder, "compile", "penalty", "k")
    assert "argument k is always 3" in str(model.report())


@DOORS
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("dict", {"b": X, "a": Q}),
        ("tuple", Pair(Q, X)),
        ("dataclass", Settings(Q, X)),
    ],
)
def test_containers_pass_as_they_are(door: str, kind: str, value: Any) -> None:
    model = compiled(Nested, door, kind)
    torch.testing.assert_close(model(X, value), Nested()(X, value))
    torch.testing.assert_close(model(X, pair=value), Nested()(X, value))


@DOORS
def test_a_constant_field_of_a_dataclass(door: str) -> None:
    with pytest.raises(InputError, match="argument pair_k is 3 in the compiled model"):
        compiled(Nested, door, "dataclass")(X, Settings(P, Q, 5))


def test_inputs_of_the_graph_by_name() -> None:
    """As in an artifact, which knows no forward."""
    model = compiled(Nested, "compile", "dict")
    torch.testing.assert_close(model(X, pair_a=Q, pair_b=P), X * Q + P)
    with pytest.raises(InputError, match="there is no input 'other'"):
        model(X, other=Q)
