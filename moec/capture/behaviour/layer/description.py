"""The data of a description: what a module computes as a mixture of experts.

A report prints a description, a file stores it, and a `Replacement` is built from it. Fields that
equal their defaults are not printed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

Path = tuple[str, ...]
"""Names of submodules that are applied to the tokens one after the other; () is the tokens."""


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
    """From logits [T, C] to choices: temperature, score, groups, top-k, renormalise, threshold,
    scale.

    `correction` names a tensor [C] that is added for ranking but not for the weights. `ranked_by`
    is "score", or "logits" where saturated scores would tie. `groups` is (groups, groups kept, best
    scores that rank a group). `threshold_on` is "weight" or "score" (choices above the threshold
    are kept) or "mass" (choices are kept while the scores of better ones sum to less). `ties` is
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
    """How many rows an expert accepts: the first max(least, round(n * factor / C)).

    n counts the tokens of a "sequence", or "all"; `round_up` rounds up rather than down. A dropped
    choice contributes "zero", the token itself ("pass"), or the token times the weight that the
    choice would have had ("weighted").
    """

    per: str = "all"
    least: int = 0
    factor: Fraction = Fraction(0)
    round_up: bool = False
    dropped: str = "zero"


@dataclass(frozen=True)
class FeedForward(_Shown):
    """How stacked parameters [E, ..] form an expert: "linear", "plain" (up, down), "gated" (gate,
    down, up) or "packed" (gate and up in one, down). `transposed` has for each matrix whether it is
    stored as [E, out, in]."""

    kind: str = ""
    activation: str = "none"
    transposed: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Router(_Shown):
    """How the logits are computed: by a `path` of submodules, or by multiplying the result of the
    path with `weight` and adding `bias`."""

    path: Path = ()
    weight: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Added(_Shown):
    """A term added for every token regardless of routing: the result of `path`, times the sigmoid
    of the one-column result of `gate` if there is one."""

    path: Path = ()
    gate: Path = ()


@dataclass(frozen=True)
class Output(_Shown):
    """A tensor in the module's result.

    `leading` is the shape before its last axis ("tokens": that of the input; "rows": [T]; "token":
    that of the input, without a last axis; "": none of these). `dtype` is torch's name of its dtype
    when the module runs in float32. `cast` is its dtype when the module runs in its own float
    dtype, where the two differ.
    """

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
    """What a module computes.

    `experts` are submodules or, with a `body`, stacked parameters; `source` is the path whose
    result they read. `weighs` is "output" where weights multiply the results of experts, "input"
    where they multiply what experts read. `outputs` has an entry for each leaf of the module's
    result. `precision` is what a 16-bit module computes in float32: nothing, the "scores" of the
    router and what follows, or its "logits" too.
    """

    experts: tuple[str, ...] = ()
    body: FeedForward | None = None
    source: Path = ()
    router: Router = Router()
    routing: RoutingRule = RoutingRule()
    weighs: str = "output"
    added: tuple[Added, ...] = ()
    capacity: Capacity | None = None
    precision: str = ""
    outputs: tuple[Output | Constant, ...] = ()
