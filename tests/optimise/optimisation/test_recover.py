"""Routers that are trained after choices, beside eager models with the same routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import moec
from moec.errors import UsageError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.passes.approximate.choices.model_choices import ModelChoices, read_choices, write_choices
from moec.passes.approximate.training import recover_routers
from tests.zoo.two_layers import Experts

WORDS, WIDTH, EXPERTS = 24, 32, 4
ARGS = (torch.zeros(2, 8, dtype=torch.int64),)


class Rows(Experts):
    def __init__(self, k: int = 2) -> None:
        torch.nn.Module.__init__(self)
        self.k, self.gate = k, torch.nn.Linear(WIDTH, EXPERTS)
        self.w = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 2 / WIDTH**0.5)


class Text(torch.nn.Module):
    """Scores of the next token by the last one, from two layers of experts."""

    def __init__(self, k: int = 2) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(WORDS, WIDTH)
        self.first, self.second = Rows(k), Rows(k)
        self.head = torch.nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).reshape(-1, WIDTH)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x).reshape(*ids.shape, WORDS)


def text(k: int = 2) -> Text:
    torch.manual_seed(0)
    return Text(k)


def tokens(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randint(WORDS, (count, 8), generator=torch.Generator().manual_seed(seed))


CALIB = {"ids": tokens(1)}


def chosen(**options: Any) -> ModelChoices:
    """The choice of one expert a token in both layers: each of them computes half as much."""
    searched = search(text(), ARGS, calib=CALIB, moves=("top-k",), **options)
    return searched.choices(choice_limits(None, searched.token_bytes("token_bytes"), None))


@pytest.fixture(scope="module")
def choices() -> ModelChoices:
    return chosen(recover=40)


def compiled(choices: ModelChoices | Path, **options: Any) -> Any:
    options = {"calib": CALIB, "build": False, **options}
    return moec.compile(text(), ARGS, choices=choices, **options)


def routers(program: Program) -> dict[str, torch.Tensor]:
    return {name: t for name, t in program.weights.items() if "gate" in name}


def divergence(scores: torch.Tensor, original: torch.Tensor) -> float:
    q, p = scores.log_softmax(-1), original.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_routers_are_trained_and_nothing_else(choices: ModelChoices) -> None:
    """On other tokens than those of the calibration data, as eager computes them."""
    model = compiled(choices, build=True)
    before = compiled(msgspec.structs.replace(choices, recover=0), calib=None)
    old, new = before.pass_results[-1].program, model.pass_results[-1].program
    changed = {n for n, t in old.weights.items() if not torch.equal(t, new.weights[n])}
    assert changed == set(routers(old))
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    eager, ids = text(k=1), tokens(2)
    original = text()(ids).detach()
    worse = divergence(eager(ids).detach(), original)
    eager.load_state_dict({**eager.state_dict(), **routers(new)})
    torch.testing.assert_close(model(ids), eager(ids).detach(), rtol=1e-4, atol=1e-5)
    assert divergence(eager(ids).detach(), original) < 0.95 * worse
    assert "recover-routers: 4 tensors of routers, 40 steps: kl" in str(model.report())


def test_a_file_repeats_it_bit_for_bit(choices: ModelChoices, tmp_path: Path) -> None:
    write_choices(choices, path := tmp_path / "a.yaml")
    assert read_choices(path).recover == 40
    first, again = (routers(compiled(c).pass_results[-1].program) for c in (choices, path))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    with pytest.raises(UsageError, match="have routers that are trained on data: give that of mo"):
        moec.compile(text(), ARGS, choices=path)


def test_a_state_that_is_not_better_is_dropped(
    choices: ModelChoices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_routers, "RATES", (1000.0,))
    model = compiled(msgspec.structs.replace(choices, recover=1))
    *_, before, result = model.pass_results
    assert result.program is before.program
    (line,) = result.says
    assert "1 steps: nothing better than kl" in line
    assert line.endswith("on 64 of 512 tokens, held out: not changed")
    assert not result.changed


def scores(program: Program, x: torch.Tensor) -> torch.Tensor:
    return evaluate(program.graph, [x], program.weights)[0]


def test_rows_that_are_rounded_have_a_derivative() -> None:
    """Of the last layer's router through no product, of the first one's through quantised ones."""
    searched = search(text(), ARGS, calib=CALIB, formats=("int2:32",), recover=150)
    model = compiled(searched.choices(choice_limits(7000, None, None)))
    *_, before, after = (result.program for result in model.pass_results)
    assert {op.name for op in after.graph.ops} >= {"grouped.quantised", "nn.quantised_linear"}
    ids, old, new = tokens(3), routers(before), routers(after)
    assert not any(torch.equal(tensor, new[name]) for name, tensor in old.items())
    original = text()(ids).detach()
    worse, better = (divergence(scores(program, ids), original) for program in (before, after))
    assert better < 0.95 * worse


def rows(count: int, seed: int) -> torch.Tensor:
    """Rows of WORDS different kinds."""
    kinds = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0))
    return kinds[tokens(seed, count)[:, 0]]


def test_a_model_that_is_no_language_model() -> None:
    torch.manual_seed(0)
    model, calib = Rows(), {"x": rows(800, 1)}
    searched = search(model, (rows(5, 0),), calib=calib, moves=("top-k",), recover=150)
    limits = choice_limits(None, searched.token_bytes("token_bytes"), None)
    result = moec.compile(
        model, (rows(5, 0),), choices=searched.choices(limits), calib=calib, build=False
    )
    *_, before, after = (step.program for step in result.pass_results)
    x = rows(200, 2)
    right = model(x).detach()
    worse, better = (float((scores(p, x) - right).norm()) for p in (before, after))
    assert better < 0.99 * worse
    assert "steps: squared error 0." in "\n".join(result.pass_results[-1].says)


class Dense(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "count", "recover", "message"),
    [
        (Rows, 1, 10, "needs data of which a part can be held out, and these are one case: give a"),
        (Dense, 64, 10, "recover trains routers, and the model has none with stored weights"),
        (Rows, 64, True, "recover is True: give a number of steps, such as 300"),
        (Rows, 64, -1, "recover is -1: give a number of steps"),
    ],
)
def test_refusals(model: type[torch.nn.Module], count: int, recover: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(model(), (rows(5, 0),), calib={"x": rows(count, 1)}, recover=recover)
