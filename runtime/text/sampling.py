"""Sampling: how the next token of a text is drawn from its logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.runtime.dtypes import Array

LIKELIEST = 512  # tokens that are sorted first where a share of the probability is searched
NEUTRAL = {
    "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
"""The numbers among the options, with the values that change nothing."""
SHARES = ("top_p", "min_p", "typical_p")
GREATEST = 1e300  # of a score: sums and differences of such ones are numbers
LEAST = float(np.finfo(np.float64).tiny)  # of a divisor, as kernels may count smaller ones as 0


class NoTokenError(InputError):
    """A text can go on with no token, as its request forbids all."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    First the logits of tokens change: those of tokens that the prompt or the text has are divided
    by `repetition_penalty` (multiplied where they are negative, arXiv 1909.05858); those of tokens
    that the text has fall by `presence_penalty`, and by `frequency_penalty` for each time, as at
    OpenAI; each (token, bias) of `logit_bias` is added.

    `temperature` 0 takes the likeliest token (of equals the lowest id). Otherwise logits are
    divided by it; then `top_k` keeps the k likeliest tokens, `top_p` the fewest whose probabilities
    reach p (nucleus sampling, arXiv 1904.09751), `min_p` those at least p times as likely as the
    likeliest (arXiv 2407.01082), and `typical_p` the fewest that reach p, with those first whose
    information is nearest to the expected one (arXiv 2202.00666). The same `seed` gives the same
    texts, independent of the other texts of the batch; None takes a new seed each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError where a value is of another type, or out of range."""
        for name in NEUTRAL:
            value = getattr(self, name)
            if not _is_a(value, int, float, np.integer, np.floating):
                raise InputError(f"{name} is {value!r}; it must be a number")
            if not math.isfinite(value):
                raise InputError(f"{name} is {value}; it must be finite")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None and not _is_a(value, int, np.integer):
                raise InputError(f"{name} is {value!r}; it must be a whole number, or omitted")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or more")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.repetition_penalty <= 0:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 "
                "changes nothing"
            )
        for name in ("top_p", "typical_p"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} is {value}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1, or omitted")
        limits = [name for name in SHARES if getattr(self, name) != NEUTRAL[name]]
        if self.temperature == 0 and (limits or self.top_k is not None):
            names = " and ".join(limits + ["top_k"] * (self.top_k is not None))
            raise InputError(
                f"{names}: temperature 0 does not sample, and these limit sampling: set a "
                "temperature, such as 1"
            )
        for item in self.logit_bias:
            token, bias = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
            if not (_is_a(token, int, np.integer) and _is_a(bias, int, float)):
                raise InputError(f"logit_bias holds {item!r}; it is a token id and a number")
            if not math.isfinite(bias or 0):
                raise InputError(f"logit_bias of token {token} is {bias}; it must be finite")

    def __str__(self) -> str:
        """What differs from taking the likeliest token; empty for nothing."""
        values = {n: v for n, v in vars(self).items() if v not in (NEUTRAL.get(n), None, ())}
        return ", ".join(f"{name} {value}" for name, value in values.items())

    def changed(self, settings: Mapping[str, Any]) -> Sampling:
        """With the fields that are given; a temperature of 0 ends the limits that are not.

        Raises InputError as `Sampling`.
        """
        ended = {"top_k": None} | {name: NEUTRAL[name] for name in SHARES}
        return replace(self, **{**(ended if settings.get("temperature") == 0 else {}), **settings})

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before."""
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        return any(getattr(self, name) != NEUTRAL[name] for name in names)


def _is_a(value: object, *types: type) -> bool:
    """Whether a value is of one of the types; a bool, which Python counts as an int, is not."""
    return isinstance(value, types) and not isinstance(value, bool)


GREEDY = Sampling()
_CONFIGURED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def configured(config: Mapping[str, Any]) -> Sampling:
    """How the makers of a model draw its tokens, by generation_config.json as transformers reads
    it: without do_sample the likeliest token is taken, and top_k 0 or -1 keeps all.

    Raises InputError as `Sampling`.
    """
    settings = {name: config[name] for name in _CONFIGURED if config.get(name) is not None}
    if settings.get("top_k") in (0, -1):
        del settings["top_k"]
    if not config.get("do_sample") or settings.get("temperature") == 0:
        settings = {name: settings[name] for name in settings if name == "repetition_penalty"}
        return Sampling(**settings)
    return Sampling(**{"temperature": 1.0, **settings})


def nucleus(scores: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The tokens i64[n] that a text may go on with, and their probabilities f64[n], whose sum is
    not 1 where some are left out."""
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # at a temperature near 0
        shares = np.exp((scores - scores.max()) / max(sampling.temperature, LEAST))
    count = len(scores) if sampling.top_k is None else min(sampling.top_k, len(scores))
    tokens = np.arange(len(scores)) if count == len(scores) else likeliest(scores, count)
    if sampling.top_p < 1:
        total, count = shares[tokens].sum(), min(LIKELIEST, len(tokens))
        while True:
            first = tokens[likeliest(scores[tokens], count)]
            reached = np.cumsum(shares[first]) >= sampling.top_p * total
            if reached.any() or count == len(tokens):
                break
            count = min(8 * count, len(tokens))
        tokens = first[: int(reached.argmax()) + 1] if reached.any() else first
    if sampling.min_p > 0:
        tokens = tokens[shares[tokens] >= sampling.min_p * shares[tokens].max()]
    if sampling.typical_p < 1:
        tokens = tokens[_typical(shares[tokens] / shares[tokens].sum(), sampling.typical_p)]
    return tokens, shares[tokens]


def likeliest(scores: Array, count: int) -> Array:
    """The indices of the greatest `count` scores, in their order; of equals the lower first."""
    if count == len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    indices = np.concatenate([above, equal[: count - len(above)]])
    return indices[np.argsort(-scores[indices], kind="stable")]


def _typical(shares: Array, mass: float) -> Array:
    information = -np.log(np.maximum(shares, LEAST))
    expected = (shares * information).sum()
    order = np.argsort(np.abs(information - expected), kind="stable")
    count = int((np.cumsum(shares[order]) < mass).sum()) + 1
    return order[:count]


@dataclass(frozen=True)
class Logprobs:
    """The log probability of a token, in the model's own distribution before any of `Sampling`, and
    those of the likeliest tokens, as (token, logprob)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs(logits: Array, token: int, top: int) -> Logprobs:
    """Those of a token that was drawn from logits f32[V]."""
    scores = logits.astype(np.float64)
    scores -= scores.max() + math.log(np.exp(scores - scores.max()).sum())
    first = likeliest(scores, min(top, len(scores))) if top else ()
    return Logprobs(float(scores[token]), tuple((int(t), float(scores[t])) for t in first))
