"""Greedy generation with a compiled causal language model.

Without states, each token runs the whole text again, exactly as the model was compiled. With
states (a key-value cache that the model updates), the prompt goes in once and then one token
at a time, and `cache_position` says where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moec.errors import InputError
from moec.runtime.checks import show_port
from moec.runtime.dtypes import Array
from moec.runtime.executor import Executor
from moec.runtime.package import Package, Port


@dataclass(frozen=True)
class CausalLM:
    """Which ports of a package are the tokens [B, S] and the logits [B, S, V].

    `longest` is the greatest number of tokens that one text may have, None without a limit.
    """

    tokens: Port
    logits: Port
    extras: tuple[Port, ...]
    cached: bool
    longest: int | None


def causal_lm(package: Package) -> CausalLM:
    """Find the ports. Raises InputError, saying why, where the model is not a causal LM."""
    tokens = [p for p in package.inputs if p.name == "input_ids"] or [
        p for p in package.inputs if p.dtype in ("i64", "i32") and len(p.shape) == 2
    ]
    logits = [
        p
        for p in package.outputs
        if p.dtype in ("f32", "bf16", "f16") and len(p.shape) == 3 and isinstance(p.shape[2], int)
    ]
    logits = [p for p in logits if p.name == "logits"] or logits[:1]
    if len(tokens) != 1 or not logits or len(tokens[0].shape) != 2:
        ports = "; ".join(map(show_port, package.inputs))
        made = "; ".join(map(show_port, package.outputs))
        raise InputError(
            "--prompt needs a model from tokens i64[B, S] to logits f32[B, S, vocabulary], and "
            f"this one takes {ports} and gives {made}; use --input"
        )
    cached = bool(package.states)
    known = {"cache_position", "position_ids"} | (set() if cached else {"attention_mask"})
    extras = tuple(p for p in package.inputs if p is not tokens[0])
    strange = [p for p in extras if p.name not in known or p.dtype not in ("i64", "i32", "bool")]
    if strange:
        raise InputError(
            f"--prompt does not know what to give for input {show_port(strange[0])}; use --input"
        )
    length = tokens[0].shape[1]
    if isinstance(length, int):
        raise InputError(
            f"--prompt needs a model whose sequence may grow, and this one was compiled for "
            f"exactly {length} tokens; compile it with a dynamic sequence"
        )
    longest = package.sizes.get(length, (0, None))[1]
    if cached:  # a cache [B, heads, length, width] is full when it is full
        lengths = [p.shape[2] for p in package.states if len(p.shape) == 4]
        longest = min((n for n in (longest, *lengths) if isinstance(n, int)), default=None)
    return CausalLM(tokens[0], logits[0], extras, cached, longest)


def generate(
    executor: Executor, prompt: list[int], most: int, stop: frozenset[int]
) -> Iterator[int]:
    """At most `most` new tokens, each the likeliest, until one of `stop` or the model's limit.

    Raises InputError where the prompt is longer than the model takes.
    """
    lm = causal_lm(executor.package)
    if lm.longest is not None and len(prompt) > lm.longest:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the model takes at most {lm.longest}"
        )
    executor.reset()
    text, done = list(prompt), 0
    for _ in range(most):
        if lm.longest is not None and len(text) > lm.longest:
            return
        logits = executor(_inputs(lm, text, done))[lm.logits.name]
        done = len(text) if lm.cached else 0
        last = logits[0, -1].astype(np.float32)
        if np.isnan(last).any():
            raise InputError(f"the logits hold NaN after {len(text)} tokens: no token is likeliest")
        token = int(np.argmax(last))
        if token in stop:
            return
        yield token
        text.append(token)


def _inputs(lm: CausalLM, text: list[int], start: int) -> dict[str, Array]:
    """Tokens `start` and after, as one batch, with the inputs that follow from their places."""
    places = np.arange(start, len(text))
    made: dict[str, Array] = {}
    for port in (lm.tokens, *lm.extras):
        if port is lm.tokens:
            array = np.array(text[start:])
        elif port.name == "attention_mask":
            array = np.ones(len(text), np.int64)
        else:
            array = places
        shaped = array if len(port.shape) == 1 else array[None]
        made[port.name] = shaped.astype(
            {"i64": np.int64, "i32": np.int32, "bool": np.bool_}[port.dtype]
        )
    return made
