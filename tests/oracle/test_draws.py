"""Every input of a module varies: by what it is for, within what the module accepts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.graph import Program
from moec.ir.text import parse
from moec.oracle.cases import cases, drawn, few_draws
from moec.oracle.draws import DRAWS, Draw, Role, pattern, role_of

GRAPH = """
graph main(ids: i64[B, S], x: f32[B, S, 4], mask: i64[B, S], keep: f32[B, S], lengths: i64[B],
           scale: f32[]; table: f32[6, 3]) {
  size B in [0, inf]
  size S in [0, inf]
  e: f32[B, S, 3] = aten.embedding.default(table, ids)
  return e, x, mask, keep, lengths, scale
}
"""


def program(zero_rows: tuple[int, ...] = ()) -> Program:
    table = torch.ones(6, 3)
    table[list(zero_rows)] = 0
    return Program(parse(GRAPH), {"table": table})


def example(batch: int = 3, length: int = 7) -> list[torch.Tensor]:
    return [
        torch.zeros(batch, length, dtype=torch.int64),
        torch.randn(batch, length, 4),
        torch.ones(batch, length, dtype=torch.int64),
        torch.ones(batch, length),
        torch.full((batch,), length),
        torch.tensor(1.0),
    ]


def test_roles() -> None:
    held = program()
    pairs = zip(held.graph.inputs, example(), strict=True)
    assert [role_of(held, value, tensor) for value, tensor in pairs] == [
        Role.IDS,
        Role.TOKENS,
        Role.MASK,
        Role.FLOAT_MASK,
        Role.INTEGERS,
        Role.NUMBERS,
    ]


@pytest.mark.parametrize(
    ("zero", "expected"), [((1, 4), {0, 2, 3, 5}), ((0, 1, 2, 3, 4, 5), {0, 1, 2, 3, 4, 5})]
)
def test_ids_of_rows_that_are_all_zero_are_left_out(
    zero: tuple[int, ...], expected: set[int]
) -> None:
    ids, *_ = drawn(program(zero), example(20, 30), DRAWS[0])
    assert set(ids.tolist()[0]) | set(ids.flatten().tolist()) == expected


def accepts(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ()


def test_every_input_varies_in_every_draw() -> None:
    first, *draws = [case for case, _ in cases(program(), example(), accepts)]
    assert len(draws) == 3
    for case in draws:
        assert all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(case, first, strict=True)
        )
        assert not any(torch.equal(a, b) for a, b in zip(case[1:], first[1:], strict=True))


def test_masks_take_every_pattern() -> None:
    generator = torch.Generator().manual_seed(0)
    prefix, random, none, suffix, one, full = pattern((6, 40), 0, generator)
    assert prefix.sort(descending=True, stable=True).values.equal(prefix)
    assert suffix.sort(stable=True).values.equal(suffix)
    assert 0 < int(random.sum()) < 40
    assert (int(none.sum()), int(one.sum()), int(full.sum())) == (0, 1, 40)


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 20))
def test_patterns_have_any_shape(shape: list[int], first: int) -> None:
    mask = pattern(shape, first, torch.Generator().manual_seed(first))
    assert mask.shape == tuple(shape)
    assert mask.dtype == torch.bool


@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from(DRAWS))
def test_draws_have_any_size(batch: int, length: int, draw: Draw) -> None:
    inputs = example(batch, length)
    for tensor, other in zip(inputs, drawn(program(), inputs, draw), strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)


MASKED = """
graph main(x: f32[B, S, 4], bias: f32[B, S], logits: f32[B, S, 4]; prior: f32[4]) {
  size B in [0, inf]
  size S in [0, inf]
  turned: f32[B, 4, S] = aten.permute.default(x) <dims=(0, 2, 1)>
  scores: f32[B, S, S] = aten.matmul.default(x, turned)
  twice: f32[B, S] = aten.mul.Tensor(bias) <other=2>
  rows: f32[B, 1, S] = aten.unsqueeze.default(twice) <dim=1>
  sum: f32[B, S, S] = aten.add.Tensor(scores, rows)
  y: f32[B, S, S] = aten.softmax.int(sum) <dim=-1>
  known: f32[B, S, 4] = aten.add.Tensor(logits, prior)
  z: f32[B, S, 4] = aten.softmax.int(known) <dim=-1>
  return y, z
}
"""


def test_what_is_added_to_scores_may_mask() -> None:
    """Whatever its example is: infinite, or the least of the dtype, at one token too."""
    held = Program(parse(MASKED), {"prior": torch.ones(4)})
    inputs = [torch.randn(3, 1, 4), torch.randn(3, 1), torch.randn(3, 1, 4)]
    pairs = zip(held.graph.inputs, inputs, strict=True)
    roles = [role_of(held, value, tensor) for value, tensor in pairs]
    assert roles == [Role.TOKENS, Role.FLOAT_MASK, Role.TOKENS]
    few = torch.stack([drawn(held, inputs, draw)[1] for draw in few_draws(held, inputs)])
    assert few.eq(-torch.inf).any()
    assert few.eq(torch.inf).any()
    assert few.eq(torch.finfo(torch.float32).min).any()
    # Code that fuses attention gives 0 where eager gives NaN, for a row of -inf.
    assert not any(drawn(held, inputs, draw)[1].isinf().any() for draw in DRAWS)


@pytest.mark.parametrize("held", [[0, 0, 0, 0], [3, 5, 1, 4]])
def test_integers_may_be_negative_and_large(held: list[int]) -> None:
    """Zeros are no mask: all would be masked."""
    graph = Program(parse("graph main(n: i64[T]) {\n  size T in [0, inf]\n  return n\n}"), {})
    numbers = [torch.tensor(held)]
    assert role_of(graph, graph.graph.inputs[0], numbers[0]) is Role.INTEGERS
    cases = [drawn(graph, numbers, draw)[0] for draw in DRAWS]
    assert min(int(case.min()) for case in cases[:3]) < 0
    assert max(int(case.max()) for case in cases) > 1000


def refuses(wrong: Callable[..., bool]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def module(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if wrong(*inputs):
            raise ValueError("refused")
        return ()

    return module


def test_lengths_that_the_module_refuses_leave_the_other_inputs_varied() -> None:
    module = refuses(lambda ids, x, mask, keep, lengths, scale: bool((lengths < 1).any()))
    for case, _ in list(cases(program(), example(), module))[1:]:
        assert int(case[4].min()) >= 1
        assert not torch.equal(case[2], torch.ones_like(case[2]))


def test_an_input_that_may_not_change_is_the_examples() -> None:
    module = refuses(lambda ids, x, mask, keep, lengths, scale: float(scale) != 1.0)
    drawings = [case for case, _ in cases(program(), example(), module)]
    assert len(drawings) == 4
    assert all(float(case[5]) == 1.0 for case in drawings)


def test_a_module_that_refuses_everything_has_no_cases() -> None:
    assert list(cases(program(), example(), refuses(lambda *_: True))) == []


def test_placeholders_keep_their_places() -> None:
    ids = torch.tensor([[1, 2, 5, 5, 5, 3, 4]])
    module = refuses(lambda ids, *_: int((ids == 5).sum()) != 3)
    inputs = [ids, *example(1, 7)[1:]]
    for case, _ in list(cases(program(), inputs, module))[1:]:
        assert (case[0] == 5).tolist() == [[False, False, True, True, True, False, False]]
