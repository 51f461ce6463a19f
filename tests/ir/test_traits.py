"""Properties of ATen ops, such as which elements they combine."""

from __future__ import annotations

import pytest
import torch

from moec.ir.aten import overload
from moec.ir.traits import (
    IDENTITIES,
    LIKES,
    POINTWISE,
    PRODUCTS,
    is_elementwise,
    is_reproducible,
)


def test_epilogues_are_elementwise() -> None:
    assert all(map(is_elementwise, POINTWISE))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten.where.self", True),
        ("aten.where.ScalarOther", True),
        ("aten.floor_divide.default", True),
        ("aten._to_copy.default", True),
        ("aten.clone.default", True),
        ("aten.expand.default", False),
        ("aten.sum.dim_IntList", False),
        ("aten.bernoulli.p", False),
        ("aten.no_such_op.default", False),
        ("nn.rms_norm", False),
    ],
)
def test_elementwise(name: str, expected: bool) -> None:
    assert is_elementwise(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten.add.Tensor", True),
        ("aten.linalg_vector_norm.default", True),
        ("moe.sort", True),
        ("aten.randn.default", False),
        ("aten.exponential.default", False),
        ("aten.multinomial.default", False),
        ("aten.empty_like.default", False),
        ("aten.new_empty.default", False),
    ],
)
def test_reproducible(name: str, expected: bool) -> None:
    assert is_reproducible(name) is expected


@pytest.mark.parametrize("name", sorted(IDENTITIES))
def test_an_identity_gives_its_input(name: str) -> None:
    x = torch.randn(3, 4)
    assert torch.equal(overload(name)(x), x)


@pytest.mark.parametrize("name", sorted(LIKES))
def test_the_fill_of_what_reads_a_shape(name: str) -> None:
    fill = LIKES[name]
    if fill is not None and "empty" not in name:
        assert bool((overload(name)(torch.randn(3)) == fill).all())


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_the_left_of_a_product_gives_the_rows(name: str) -> None:
    first = PRODUCTS[name]
    kind = name.split(".")[1]
    batch = (2,) if kind in ("bmm", "baddbmm") else ()
    right = (5, 4) if kind == "linear" else (4, 5)
    inputs = [torch.randn(*batch, 3, 4), torch.randn(*batch, *right)]
    if first:
        inputs.insert(0, torch.zeros(*batch, 3, 5))
    left = inputs[first].clone()
    inputs[first][..., 1:, :] = 0  # the rows of the left one are those of the result
    result = overload(name)(*inputs)
    assert bool((result[..., 1:, :] == 0).all())
    assert bool((left[..., 0, :] != 0).any())
