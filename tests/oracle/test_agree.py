"""Agreement: all draws, all results, and in 16 bits rounding alone is excused."""

from __future__ import annotations

import pytest
import torch

from moec.ir.graph import Program
from moec.ir.interpret.outputs import VaryingOutput
from moec.ir.text import parse
from moec.oracle.agree import agree, agree_at_sizes, same_results

MASKED = """
graph main(x: {dtype}[B, S, 4], keep: f32[B, S]) {{
  size B in [0, inf]
  size S in [0, inf]
  y: {dtype}[B, S, 4] = aten.mul.Scalar(x) <other=2>
  return y
}}
"""


def program(dtype: str = "f32") -> Program:
    return Program(parse(MASKED.format(dtype=dtype)), {})


def example(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 6, 4).to(dtype), torch.ones(2, 6)]


def doubled(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2,)


def masked(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2 * keep[..., None],)


def masked_but_one(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return doubled(x, keep) if x.shape[1] == 1 else masked(x, keep)


def test_a_program_agrees_with_its_module() -> None:
    assert agree(program(), doubled, example()) is True


def test_an_input_that_the_example_leaves_at_one_value_is_drawn() -> None:
    assert agree(program(), masked, example()) is False


def test_values_vary_at_other_sizes_too() -> None:
    assert agree_at_sizes(program(), masked_but_one, example(), {"S": 1}) is True
    assert agree_at_sizes(program(), masked_but_one, example(), {"S": 2}) is False
    assert agree_at_sizes(program(), masked, example(), {"S": 1}) is False
    assert agree_at_sizes(program(), masked, example(), {"B": 0}) is True


def test_a_module_that_refuses_all_inputs_neither_agrees_nor_disagrees() -> None:
    def refuses(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise ValueError("never")

    assert agree(program(), refuses, example()) is None


def test_other_constants_are_a_disagreement() -> None:
    def varies(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise VaryingOutput("loss is 0.0 in one run and 1.0 in another")

    assert agree(program(), varies, example()) is False


def test_a_module_that_writes_into_its_inputs_changes_no_case() -> None:
    def doubles_in_place(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.mul_(2),)

    x, keep = example()
    before = x.clone()
    assert agree(program(), doubles_in_place, [x, keep]) is True
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_meaning_is_compared_in_float32(dtype: torch.dtype) -> None:
    """One value in a thousand is off by a sixteenth in eager in 16 bits, as after a near tie."""

    def strays(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.dtype == torch.float32:
            return doubled(x, keep)
        return (x * 2 * torch.where(torch.arange(4) == 1, 1.0625, 1.0).to(x.dtype),)

    def wrong(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 2 * torch.where(torch.arange(4) == 1, 1.0625, 1.0).to(x.dtype),)

    short = "bf16" if dtype == torch.bfloat16 else "f16"
    case = example(dtype)
    assert same_results(program(short), strays, case, strays(*case))
    assert not same_results(program(short), wrong, case, wrong(*case))


def test_fewer_results_than_the_module_has_differ() -> None:
    case = example()
    assert not same_results(program(), doubled, case, (*doubled(*case), case[0]))
