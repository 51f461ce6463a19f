"""Formats of single experts: what is planted decides who gets the bits, and the sum is optimal."""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.optimise.optimisation.pareto import in_one_format
from moec.optimise.optimisation.search import ChoiceSearch
from moec.optimise.optimisation.sensitivity import StoredProduct
from moec.optimise.optimisation.solve import silent_library, solve
from moec.passes.approximate.choices.model_choices import (
    ModelChoices,
    ProductChoice,
    read_choices,
    write_choices,
)
from tests.zoo.two_layers import Experts

EXPERTS, WIDTH, K = 6, 64, 2
FORMATS = ("int8", "int4:32", "int2:32")
STACK = EXPERTS * WIDTH * WIDTH
ROUTER = 4 * EXPERTS * WIDTH
EACH = {"int8": WIDTH * (WIDTH + 2), "int4:32": WIDTH * (32 + 4), "int2:32": WIDTH * (16 + 4)}


class Planted(Experts):
    """Tokens with a positive first feature choose experts 0 (weight .95) and 1 (.05), the others 2
    (.95) and 3 (.05); nobody chooses 4 and 5. All experts have equally large weights."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        sides = torch.tensor([10.0, 7, -13, -10, 0, 0])
        self.gate.weight = torch.nn.Parameter(torch.zeros(EXPERTS, WIDTH))
        self.gate.weight.data[:, 0] = sides
        self.gate.weight.data[:, 1] = torch.tensor([0.0, 0, 0, 0, -20, -20])
        self.w = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)


def data(rows: int) -> torch.Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    x[:, 0], x[:, 1] = torch.where(x[:, 0] > 0, 1.0, -1.0), 1.0
    return x


ARGS = (data(5),)


def searched(**more: object) -> ChoiceSearch:
    torch.manual_seed(0)
    options = {"calib": {"x": data(400)}, "formats": FORMATS, "moves": ("expert-formats",), **more}
    return search(Planted(), ARGS, **options)


@pytest.fixture(scope="module")
def planted() -> ChoiceSearch:
    return searched()


class Loud(Planted):
    """The rows of experts 0 and 1 are a thousand times as large, and results are of length 1. With
    `gated` an expert is w h(v x) of two products."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.v = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y / y.norm(dim=-1, keepdim=True)

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        rows = torch.where(x[:, :1] > 0, 1000 * x, x)
        return super().expert(e, torch.relu(linear(rows, self.v[e])) if self.gated else rows)


def by_expert(choices: ModelChoices) -> list[str]:
    (choice,) = (c for name, c in choices.products.items() if name != "gate")
    return by_expert_of(choice)


def by_expert_of(choice: ProductChoice) -> list[str]:
    formats = [choice.format] * EXPERTS
    for format, experts in choice.experts.items():
        for e in experts:
            formats[e] = format
    return formats


def room(*formats: str) -> ModelChoices:
    return choice_limits(ROUTER + sum(EACH[format] for format in formats), None, None)


def test_what_is_never_chosen_gets_the_fewest_bits_and_what_matters_the_most(planted):
    """Of two experts in as many tokens, the one with the greater weights of the router."""
    expected = ["int8", "int4:32", "int8", "int4:32", "int2:32", "int2:32"]
    assert by_expert(planted.choices(room(*expected))) == expected


@pytest.mark.parametrize("gated", [False, True])
def test_large_rows_count_for_what_the_model_makes_of_them(gated: bool):
    torch.manual_seed(0)
    data_of = {"calib": {"x": data(400)}, "formats": FORMATS, "moves": ("expert-formats",)}
    loud = search(Loud(gated), ARGS, **data_of)
    expected = ["int8", "int4:32", "int8", "int4:32", "int2:32", "int2:32"]
    sizes = ROUTER + (1 + gated) * sum(EACH[format] for format in expected)
    choices = loud.choices(choice_limits(sizes, None, None))
    for choice in (c for name, c in choices.products.items() if name != "gate"):
        assert by_expert_of(choice) == expected


def test_tokens_may_go_to_other_experts_in_16_bits():
    """Rows of experts are read in the model's dtype, gradients in float32."""
    torch.manual_seed(0)
    model = Planted().bfloat16()
    model.gate.weight.data.copy_(torch.randn(1, WIDTH) + 1e-3 * torch.randn(EXPERTS, WIDTH))
    x = torch.randn(400, WIDTH).bfloat16()
    wide = Planted()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    chosen = (m.gate(v).topk(K).indices.sort(-1)[0] for m, v in ((model, x), (wide, x.float())))
    assert not torch.equal(*chosen)
    options = {"calib": {"x": x}, "formats": FORMATS, "moves": ("expert-formats",)}
    assert search(model, (x[:5],), **options).choices(room(*["int4:32"] * EXPERTS))


def test_the_file_has_the_numbers_and_is_read_again(planted, tmp_path: Path):
    choices = planted.choices(room("int8", "int8", *["int2:32"] * 4))
    assert by_expert(choices) == ["int8", "int2:32", "int8", *["int2:32"] * 3]
    write_choices(choices, path := tmp_path / "a.yaml")
    assert read_choices(path) == choices
    assert "int8: [0, 2]" in path.read_text()
    assert choices.bytes == ROUTER + 2 * EACH["int8"] + 4 * EACH["int2:32"]
    model = moec.compile(Planted(), ARGS, choices=choices, calib={"x": data(9)}, build=False)
    (line,) = model.quantised
    assert line.format == "int2:32 and int8"
    assert line.bytes_after == choices.bytes - ROUTER


def test_less_damage_than_formats_of_products_at_equal_bytes(planted):
    """Those nobody chooses cost the others nothing but bytes."""
    alone = in_one_format(planted, "int4:32").solve("bytes")
    pick = planted.solve("damage", bytes=alone.bytes)
    assert pick.bytes <= alone.bytes
    ours, theirs = (planted.measured(p).distance.error for p in (pick, alone))
    assert ours < 0.3 * theirs
    assert 0.5 < (pick.damage / ours**2) < 2


def test_a_loss_has_fewer_bytes_than_with_formats_of_products(planted):
    loss = choice_limits(None, None, "error<=0.02")
    least = planted.choices(loss)
    products = searched(moves=("formats",)).choices(loss)
    assert least.bytes < 0.8 * products.bytes
    assert least.damage**0.5 <= 0.02


def test_a_product_in_fp8_or_unchanged_is_one_as_a_whole():
    """Experts of one stack round rows alike, so that these are chosen for all or none."""
    every = searched(formats=("fp8", "int8", "int2:32"))
    (product,) = (p for p in every.products if p.experts)
    assert [o.format for o in product.experts[0]] == ["int8", "int2:32"]
    assert [o.format for o in product.options] == ["unchanged", "fp8", "int8", "int2:32"]
    assert not any(p.experts for p in searched(formats=("fp8", "int8")).products)


def test_fewer_experts_for_each_token_leave_their_formats():
    """A token reads one of six experts then: a sixth of the bytes of all."""
    both = searched(moves=("expert-formats", "top-k"))
    everywhere = 6 * EACH["int2:32"]
    limits = choice_limits(None, ROUTER + everywhere // 3 - 1, None)
    choices = both.choices(limits)
    assert [layer.top_k for layer in choices.layers.values()] == [1]
    assert len(set(by_expert(choices))) > 1
    assert choices.token_bytes <= limits.token_bytes


def test_experts_that_prune_drops_would_have_other_numbers():
    with pytest.raises(UsageError, match="moves expert-formats and prune: fewer experts change"):
        searched(moves=("expert-formats", "prune"))


@pytest.mark.skipif(sys.platform == "win32", reason="it is not silent there")
def test_what_the_solver_prints_is_not_in_the_output(capfd):
    """By printf of C, which writes after what Python has written if nothing flushes it."""
    with silent_library():
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
    print("{}")
    assert capfd.readouterr().out == "{}\n"


amounts = st.tuples(st.integers(1, 50), st.integers(0, 50))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(amounts, min_size=2, max_size=2), min_size=1, max_size=3), amounts, amounts
)
def test_no_better_choice_exists(experts, joint, limit):
    """Each expert in a format of its own, or all of them in one that is for none alone."""

    def option(format: int, size: int, damage: int) -> ProductChoice:
        return ProductChoice(1, 1, f"f{format}", size, 100, float(damage))

    singles = tuple(tuple(option(n, *each) for n, each in enumerate(of)) for of in experts)
    product = StoredProduct("a", (option(2, *joint),), "", singles)
    room = sum(limit)
    every = [[product.options[0]], *itertools.product(*singles)]
    sums = [(sum(o.bytes for o in each), sum(o.damage for o in each)) for each in every]
    possible = [damage for size, damage in sums if size <= room]
    pick = solve([product], {}, "damage", bytes=room)
    assert (pick is None) == (not possible)
    if pick is not None:
        assert pick.damage <= min(possible) + 1e-3
        assert (pick.bytes, pick.damage) in sums
        (choice,) = pick.options.values()
        assert choice.bytes == pick.bytes
