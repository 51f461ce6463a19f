"""--shapes: the syntax for varying sizes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.commands.options.shapes import AxisSize, dynamic_shapes, parse
from moec.errors import UsageError


def test_names_bounds_and_numbers() -> None:
    assert parse(("input_ids=B[1..8]xS[1..4096]", "x=Tx64")) == {
        "input_ids": (AxisSize(name="B", low=1, high=8), AxisSize(name="S", low=1, high=4096)),
        "x": (AxisSize(name="T"), AxisSize(size=64)),
    }


def test_bounds_written_once_hold_everywhere() -> None:
    parsed = parse(("a=BxS,b=B[2..]xS[..16]",))
    assert parsed["a"] == parsed["b"] == (AxisSize(name="B", low=2), AxisSize(name="S", high=16))


def test_unnamed_axis() -> None:
    assert parse(("x=?x4",)) == {"x": (AxisSize(), AxisSize(size=4))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("BxS", "'BxS' is not INPUT=SIZES"),
        ("x=", "'x=' is not INPUT=SIZES"),
        ("x=Bx", "cannot read a size at ''"),
        ("x=bxS", "cannot read a size at 'bxS'"),
        ("x=B[1:8]", "cannot read a size at '[1:8]'"),
        ("x=B[8..1]", "B ends at 1, before 8"),
        ("x=B,x=S", "gives x twice"),
        ("x=B[1..8],y=B[1..9]", "gives B two bounds: 1..8 and 1..9"),
    ],
)
def test_refusals_say_how(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse((text,))
    assert words in str(refusal.value)


def test_torch_export_reads_them() -> None:
    shapes = dynamic_shapes(parse(("x=T[1..512]x64",)))
    assert shapes is not None
    dim = shapes["x"][0]
    assert (dim.__name__, dim.min, dim.max) == ("T", 1, 512)
    assert shapes["x"][1] == 64
    assert dynamic_shapes({}) is None


_sizes = st.one_of(
    st.integers(0, 10**6).map(str),
    st.just("?"),
    st.from_regex(r"[A-Z][A-Z0-9_]{0,5}", fullmatch=True),
)


@given(st.lists(_sizes, min_size=1, max_size=5))
def test_every_axis_is_read_back(sizes: list[str]) -> None:
    (axes,) = parse((f"x={'x'.join(sizes)}",)).values()
    assert [str(a.size) if a.size is not None else a.name or "?" for a in axes] == [
        str(int(s)) if s.isdigit() else s for s in sizes
    ]


@given(st.text(alphabet="xXB0123[].=,? ", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse((text,))
