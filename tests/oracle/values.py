"""The values of second inputs by the name of the parameter, that of an example first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.oracle.experts import D, E, P, Routed

Values = dict[str, Tensor]
Draw = Callable[[int, int, torch.Generator], Values]


def keep(B: int, S: int, random: torch.Generator) -> Values:
    """bool[B, S], true for tokens."""
    length = torch.randint(1, S + 1, (B, 1), generator=random)
    one = torch.zeros(B * S, dtype=torch.bool)
    one[torch.randint(B * S, (1,), generator=random)] = True
    return {
        "all": torch.ones(B, S, dtype=torch.bool),
        "none": torch.zeros(B, S, dtype=torch.bool),
        "random": torch.rand(B, S, generator=random) < 0.5,
        "prefix": torch.arange(S) < length,
        "suffix": torch.arange(S) >= S - length,
        "one": one.view(B, S),
    }


def of_keep(change: Callable[[Tensor], Tensor]) -> Draw:
    return lambda B, S, random: {k: change(v) for k, v in keep(B, S, random).items()}


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


def loss_mask(B: int, S: int, random: torch.Generator) -> Values:
    floats = {k: v.float() for k, v in keep(B, S, random).items()}
    return floats | {"shares": torch.rand(B, S, generator=random)}


def causal(B: int, S: int, random: torch.Generator) -> Values:
    """bool[S, S]."""
    ones = torch.ones(S, S, dtype=torch.bool)
    noise = torch.rand(S, S, generator=random) < 0.5
    return {"all": ones, "lower": ones.tril(), "upper": ones.triu(), "random": noise | ones.tril()}


def allowed(B: int, S: int, random: torch.Generator) -> Values:
    """bool[E], of which one at least is true: else all scores are equal."""
    return {k: v[0].index_fill(0, torch.tensor(1), True) for k, v in keep(1, E, random).items()}


def lengths(B: int, S: int, random: torch.Generator) -> Values:
    """i64[B]."""
    return {
        "full": torch.full((B,), S),
        "one": torch.ones(B, dtype=torch.long),
        "random": torch.randint(1, S + 1, (B,), generator=random),
        "zeros": torch.zeros(B, dtype=torch.long),
        "with zeros": torch.randint(0, S + 1, (B,), generator=random),
        "half": torch.full((B,), (S + 1) // 2),
    }


def steps(B: int, S: int, random: torch.Generator) -> Values:
    """i64[S]."""
    return {
        "arange": torch.arange(S),
        "reversed": torch.arange(S).flip(0),
        "zeros": torch.zeros(S, dtype=torch.long),
        "later": torch.arange(S) + 7,
        "random": torch.randint(P, (S,), generator=random),
    }


def positions(B: int, S: int, random: torch.Generator) -> Values:
    """i64[B, S]."""
    rows = {k: v.repeat(B, 1) for k, v in steps(B, S, random).items()}
    return rows | {"random": torch.randint(P, (B, S), generator=random)}


def ids(count: int, *dims: str) -> Draw:
    """i64[B], or i64[B, S]."""

    def draw(B: int, S: int, random: torch.Generator) -> Values:
        shape = tuple({"B": B, "S": S}[dim] for dim in dims)
        return {str(n): torch.full(shape, n) for n in range(count)} | {
            f"random {n}": torch.randint(count, shape, generator=random) for n in range(2)
        }

    return draw


def prior(*dims: str) -> Draw:
    """f[E], or f[B, E]."""

    def draw(B: int, S: int, random: torch.Generator) -> Values:
        shape = (*((B,) if "B" in dims else ()), E)
        first, last = torch.zeros(shape), torch.zeros(shape)
        first[..., 0], last[..., -1] = 9.0, -9.0
        return {
            "zeros": torch.zeros(shape),
            "random": torch.randn(shape, generator=random) * 2,
            "first": first,
            "not last": last,
            "small": torch.randn(shape, generator=random) / 4,
        }

    return draw


def numbers(*values: float, shape: tuple[int, ...] = ()) -> Draw:
    return lambda B, S, random: {str(v): torch.full(shape, v) for v in values}


def normal(shape: Callable[[int, int], tuple[int, ...]]) -> Draw:
    def draw(B: int, S: int, random: torch.Generator) -> Values:
        noise = torch.randn(shape(B, S), generator=random)
        return {"zeros": noise * 0, "normal": noise, "small": noise / 4, "large": noise * 4}

    return draw


def rows(draw: Draw) -> Draw:
    """As `draw`, for all tokens in one dimension."""
    return lambda B, S, random: {k: v[0] for k, v in draw(1, B * S, random).items()}


VALUES: dict[str, Draw] = {
    "keep": keep,
    "pad": of_keep(torch.logical_not),
    "attention_mask": of_keep(Tensor.long),
    "loss_mask": loss_mask,
    "additive": of_keep(additive),
    "extended": of_keep(lambda mask: torch.where(mask, 0.0, -1e4)[:, None, None]),
    "valid": rows(keep),
    "causal": causal,
    "allowed": allowed,
    "lengths": lengths,
    "steps": steps,
    "positions": positions,
    "segments": ids(3, "B", "S"),
    "types": ids(2, "B", "S"),
    "task": ids(3, "B"),
    "prior": prior(),
    "priors": prior("B"),
    "temperature": numbers(1.0, 0.5, 2.0, 0.1, 10.0),
    "sharpness": numbers(1.0, 0.5, 2.0, 4.0, 0.25, shape=(1,)),
    "scale": numbers(1.0, 0.5, 2.0, 0.0, 0.25),
    "noise": normal(lambda B, S: (B, S, E)),
    "previous": normal(lambda B, S: (B, D)),
    "flag": lambda B, S, random: {k: torch.tensor(k == "yes") for k in ("no", "yes")},
}


def inputs(names: tuple[str, ...], B: int, S: int, number: int) -> tuple[str, tuple[Any, ...]]:
    """The first input and values of the others, number 0 being the example's; and their names."""
    random = torch.Generator().manual_seed(B * 1000 + S * 10 + number)
    shape = (B * S, D) if names[0] == "tokens" else (B, S, D)
    drawn = [VALUES[name](B, S, random) for name in names[1:]]
    chosen = [list(values)[number % len(values)] for values in drawn]
    others = [values[name] for values, name in zip(drawn, chosen, strict=True)]
    return ", ".join(chosen), (torch.randn(shape, generator=random), *others)


def parameters(module: Routed) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def example(module: Routed) -> tuple[Any, ...]:
    return inputs(parameters(module), *module.example, 0)[1]
