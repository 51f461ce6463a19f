"""Every kind of invalid input has its message, and valid inputs are accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import InputError
from moec.runtime.checks import check_inputs, check_no_nan
from moec.runtime.package import Function, Port

FUNCTION = Function(
    inputs=(
        Port("input_ids", "i64", ("B", "S")),
        Port("mask", "bool", ("B", "1 + S")),
        Port("scale", "f32", (3,)),
        Port("low", "bf16", ("2*N",)),
    ),
    sizes={"B": (1, 8), "S": (1, 128), "N": (0, None)},
    index_ranges={"input_ids": (0, 99)},
)


def right(**changes: Any) -> dict[str, Any]:
    import ml_dtypes

    result = {
        "input_ids": np.arange(6).reshape(2, 3),
        "mask": np.ones((2, 4), bool),
        "scale": np.ones(3, np.float32),
        "low": np.ones(4, ml_dtypes.bfloat16),
        **changes,
    }
    return {name: value for name, value in result.items() if value is not None}


TAKES = (
    "(the model takes input_ids: i64[B, S]; mask: bool[B, 1 + S]; scale: f32[3]; low: bf16[2*N])"
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": None}, f"input 'mask' is missing {TAKES}"),
        ({"maks": np.ones(1), "mask": None}, f"no input 'maks'; did you mean 'mask'? {TAKES}"),
        ({"zzz": np.ones(1)}, f"there is no input 'zzz' {TAKES}"),
        ({"scale": [1.0, 2.0, 3.0]}, "input 'scale' is a list, expected a tensor f32[3]"),
        ({"scale": np.ones(3)}, "input 'scale' is f64, expected f32; convert it"),
        ({"scale": torch.ones(3).half()}, "input 'scale' is f16, expected f32; convert it"),
        (
            {"scale": torch.ones(3, device="meta")},
            "is on meta, and the model runs on the CPU",
        ),
        (
            {"scale": torch.ones(3).to_sparse()},
            "input 'scale' has the layout torch.sparse_coo; give x.to_dense()",
        ),
        ({"scale": np.array(["a"])}, "input 'scale' is <U1, expected f32"),
        ({"input_ids": np.ones((2, 3), np.int32)}, "input 'input_ids' is i32, expected i64"),
        ({"input_ids": np.arange(6)}, "'input_ids' has 1 axes [6], expected 2: [B, S]"),
        ({"scale": np.ones(4, np.float32)}, "axis 0 of input 'scale' is 4, expected 3"),
        (
            {"mask": np.ones((1, 4), bool)},
            "axis 0 of input 'mask' is 1, expected 2 (B), "
            "because axis 0 of 'input_ids' gives B = 2",
        ),
        (
            {"mask": np.ones((2, 3), bool)},
            "axis 1 of input 'mask' is 3, expected 4 (1 + S), "
            "because axis 1 of 'input_ids' gives S = 3",
        ),
        (
            {"input_ids": np.zeros((2, 129), int)},
            "axis 1 of input 'input_ids' is 129, and the model was compiled for S from 1 to 128",
        ),
        (
            {"input_ids": np.zeros((2, 0), int)},
            "axis 1 of input 'input_ids' is 0 (it has no tokens), "
            "and the model was compiled for S from 1 to 128",
        ),
        (
            {"input_ids": np.array([[0, 1, 2], [3, 100, 5]])},
            "input 'input_ids' holds 100 at [1, 1], and its values must be from 0 to 99",
        ),
        ({"input_ids": -torch.ones(2, 3).long()}, "input 'input_ids' holds -1 at [0, 0]"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(FUNCTION, right(**changes))
    assert words in str(caught.value)


@given(batch=st.integers(1, 8), length=st.integers(1, 128), pairs=st.integers(0, 5))
def test_accepts(batch: int, length: int, pairs: int) -> None:
    import ml_dtypes

    result = right(
        input_ids=np.full((batch, length), 99),
        mask=np.ones((batch, length + 1), bool),
        low=np.ones(2 * pairs, ml_dtypes.bfloat16),
    )
    assert check_inputs(FUNCTION, result) == {"B": batch, "S": length, "N": pairs}


def test_a_size_is_learned_from_any_input() -> None:
    ports = (Port("double", "f32", ("2*T",)), Port("single", "f32", ("T",)))
    package = replace(FUNCTION, inputs=ports, sizes={"T": (0, 9)}, index_ranges={})
    arrays = {"double": np.ones(6, np.float32), "single": np.ones(3, np.float32)}
    assert check_inputs(package, arrays) == {"T": 3}
    with pytest.raises(
        InputError, match=r"'double' is 6, expected 4 \(2\*T\), because axis 0 of 'single'"
    ):
        check_inputs(package, arrays | {"single": np.ones(2, np.float32)})


def test_a_size_that_only_shows_in_an_expression() -> None:
    ports = (Port("x", "f32", ("8*N + 1",)), Port("y", "f32", ("N + M",)))
    package = replace(FUNCTION, inputs=ports, sizes={"N": (1, 3)}, index_ranges={})

    def check(x: int) -> dict[str, int]:
        return check_inputs(package, {"x": np.ones(x, "f4"), "y": np.ones(9, "f4")})

    assert check(17) == {"N": 2}
    with pytest.raises(InputError, match=r"axis 0 of input 'x' is 16, expected a size of the form"):
        check(16)
    with pytest.raises(InputError, match="'x' is 33, so N is 4, and the model was compiled for N"):
        check(33)


def test_an_unbounded_size_with_a_least_value() -> None:
    package = replace(FUNCTION, inputs=FUNCTION.inputs[:1], sizes={"B": (2, None)})
    with pytest.raises(InputError, match="was compiled for B at least 2"):
        check_inputs(package, {"input_ids": np.zeros((1, 3), np.int64)})


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "c8", "bf16"])
def test_nan(dtype: str) -> None:
    import ml_dtypes

    array = np.zeros((2, 3), ml_dtypes.bfloat16 if dtype == "bf16" else dtype)
    check_no_nan("output", {"x": array, "n": np.zeros(3, int), "none": array[:0]})
    array[1, 2] = np.nan
    with pytest.raises(InputError, match=r"output 'x' contains NaN, first at \[1, 2\]"):
        check_no_nan("output", {"x": array})
    with pytest.raises(InputError, match="input 'x' contains NaN"):
        check_no_nan("input", {"x": array})
