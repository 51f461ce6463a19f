"""The names of an op's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import pytest

from moec.errors import IRError
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import signature
from moec.ir.ops import OPS

OP = Op("moe.it", (), (Value("y", TensorType("f32", ())),))


@pytest.mark.parametrize(
    ("text", "inputs", "attrs", "expected"),
    [
        ("x, w, b?biased", "xw", {}, {"x": "x", "w": "w", "b": None}),
        ("x, w, b?biased", "xwb", {"biased": True}, {"x": "x", "w": "w", "b": "b"}),
        ("x, w?, b?", "xw", {}, {"x": "x", "w": "w", "b": None}),
        ("x, c?kinds:constant, z?added", "xz", {"kinds": ("copy",), "added": True},
         {"x": "x", "c": None, "z": "z"}),
        ("x, c?kinds:constant", "xc", {"kinds": ("copy", "constant")}, {"x": "x", "c": "c"}),
        ("x, m*, b*matrices?biased, o?gather", "xmnbco", {"matrices": 2, "biased": 1, "gather": 2},
         {"x": "x", "m": ("m", "n"), "b": ("b", "c"), "o": "o"}),
        ("x, m*, b*matrices?biased", "xm", {"matrices": 1}, {"x": "x", "m": ("m",), "b": ()}),
        ("", "", {}, {}),
    ],
)  # fmt: skip
def test_inputs_have_names(
    text: str, inputs: str, attrs: Mapping[str, object], expected: object
) -> None:
    assert signature(text).bind(OP, inputs, attrs) == expected


@pytest.mark.parametrize(
    ("text", "inputs", "attrs", "reason"),
    [
        ("x, w", "x", {}, "the input w is missing"),
        ("x, b?biased", "x", {"biased": True}, "the input b is missing"),
        ("x, b?biased", "xb", {}, "has inputs that no attribute names"),
        ("x, m*, o?gather", "x", {"gather": 2}, "the input o is missing"),
    ],
)
def test_refused(text: str, inputs: str, attrs: Mapping[str, object], reason: str) -> None:
    with pytest.raises(IRError, match=reason):
        signature(text).bind(OP, inputs, attrs)


@pytest.mark.parametrize("name", OPS)
def test_a_reference_tells_of_each_input(name: str) -> None:
    """The docstring of an op's reference is its documentation: inputs are before the arrow."""
    words = inspect.getdoc(OPS[name].reference) or ""
    assert "->" in words
    optional = [o.name for o in OPS[name].signature.operands if o.optional and not o.many]
    assert words.partition("->")[0].count("?") >= len(optional) or "Inputs as in" in words
