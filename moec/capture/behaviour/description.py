"""What a module does as a mixture of experts, in names and numbers alone.

A report prints a description, a file holds it, and a `Replacement` is built from it. Fields that
equal their defaults say nothing and are not printed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

Path = tuple[str, ...]
"""Submodules called one after the other, by name, beginning with the tokens; () is the tokens."""


class _Shown:
    """Prints the fields that differ from their defaults."""

    def __str__(self) -> str:
        shown = [
            (f.name, getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return ", ".join(
            f"{name}=({value})" if isinstance(value, _Shown) else f"{name}={_text(value)}"
            for name, value in shown
        )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        items = [_text(item) for item in value]
        if len(items) > 3 and all(isinstance(item, str) for item in value):
            items = [items[0], "...", items[-1]]
        return f"({', '.join(items)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RoutingRule(_Shown):
    """Logits[T, C] to choices: temperature, score, groups, top-k, renormalise, threshold, scale.

    `correction` names a tensor [C] added to what is ranked and not to what weighs. `ranked_by`
    is "score", or "logits" where a saturated score would tie. `groups` is (groups, groups kept,
    best scores that rank a group). `threshold_on` is "weight" or "score" (choices above the
    threshold are kept) or "mass" (kept while the scores before them sum to less). `ties` is
    "topk" (torch.topk's order among equals) or "first" (the lower id).
    """

    score: str = ""
    top_k: int = 0
    renormalise: bool = False
    eps: float = 0.0
    eps_is_floor: bool = False
    scale: float = 1.0
    temperature: float = 1.0
    correction: str = ""
    ranked_by: str = "score"
    groups: tuple[int, int, int] | tuple[()] = ()
    threshold_on: str = ""
    threshold: float = 0.0
    renormalise_again: bool = False
    ties: str = "topk"


@dataclass(frozen=True)
class Capacity(_Shown):
    """First come, first served: an expert takes max(least, round(n * factor / C)) rows.

    n counts the tokens of a "sequence", or "all"; `round_up` rounds up rather than down. A
    dropped choice gives "zero", the token itself ("pass"), or the token times the weight that
    the choice would have had ("weighted").
    """

    per: str = "all"
    least: int = 0
    factor: Fraction = Fraction(0)
    round_up: bool = False
    dropped: str = "zero"


@dataclass(frozen=True)
class FeedForward(_Shown):
    """What stacked parameters [E, ..] make of rows: "linear", "plain" (up, down), "gated" (gate,
    down, up) or "packed" (gate and up in one, down); `transposed` says for each matrix whether
    it is stored as [E, out, in]."""

    kind: str = ""
    activation: str = "none"
    transposed: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Router(_Shown):
    """Where the logits come from: the last of a `path` of submodules, or a product of what the
    path gives with `weight` and `bias`, both sides normalised first if `cosine`."""

    path: Path = ()
    weight: str = ""
    bias: str = ""
    cosine: bool = False


@dataclass(frozen=True)
class Added(_Shown):
    """What is added for every token, whatever its choice: a path times a number, or times the
    sigmoid of the one column that `gate` gives."""

    path: Path = ()
    factor: float = 1.0
    gate: Path = ()


@dataclass(frozen=True)
class NoNetwork(_Shown):
    """A column of the router beyond the experts: "zero", "copy", or "constant": two shares, the
    softmax of what `mix` gives, of the token and of row `row` of `constants`."""

    kind: str = "zero"
    constants: str = ""
    row: int = 0
    mix: Path = ()


@dataclass(frozen=True)
class Output(_Shown):
    """A tensor that comes back: its name, its shape before the last axis ("tokens": as the input
    has it; "rows": [T]; "token": the input's, without a last axis; "": neither), and its dtype as
    torch names it when the module runs in float32. `cast` is its dtype in a module of other
    floats, where that is not the tokens'."""

    name: str = "hidden"
    leading: str = "tokens"
    dtype: str = "float32"
    cast: str = ""


@dataclass(frozen=True)
class Constant(_Shown):
    """An output that is the same for every input: a number, None, a flag."""

    value: object = None


PRECISIONS = ("", "scores", "logits")


@dataclass(frozen=True)
class Description(_Shown):
    """`form`: "topk", "given" (the choice is an input), "two levels" (a router over groups, and
    one in each) or "soft slots" (slots are mixtures of tokens).

    `experts` are submodules or, with a `body`, stacked parameters; `source` is what they read.
    `weighs` tells whether weights multiply the "output" of experts or their "input". `log_sum_exp`
    is the logarithm of the weighted sum of exponentials, with `floor` for a sum of zero. `outputs`
    names each leaf of what the module returns, or holds a constant. `precision` is what a module
    of 16 bits computes in float32: nothing, the "scores" of the router and what follows, or its
    "logits" too.
    """

    form: str = "topk"
    experts: tuple[str, ...] = ()
    body: FeedForward | None = None
    source: Path = ()
    router: Router | None = None
    inner_routers: tuple[str, ...] = ()
    routing: RoutingRule | None = None
    weighs: str = "output"
    log_sum_exp: bool = False
    floor: float = 0.0
    added: tuple[Added, ...] = ()
    no_network: tuple[NoNetwork, ...] = ()
    capacity: Capacity | None = None
    precision: str = ""
    outputs: tuple[Output | Constant, ...] = ()
