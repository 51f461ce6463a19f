"""The ports of a function that make it a causal language model, and its inputs for a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.dtypes import INDEX_DTYPES
from moec.errors import InputError
from moec.runtime.checks import show_port
from moec.runtime.dtypes import Array
from moec.runtime.package import Function, Port


@dataclass(frozen=True)
class CausalLM:
    """The ports of the tokens [B, S] and the logits [B, S, V] of a function.

    `longest` is the greatest number of tokens of a text, None without a limit.
    """

    tokens: Port
    logits: Port
    extras: tuple[Port, ...]
    cached: bool
    longest: int | None


def causal_lm(function: Function) -> CausalLM:
    """Find the ports. Raises InputError, saying why, where the model is not a causal LM."""
    tokens = [p for p in function.inputs if p.name == "input_ids"] or [
        p for p in function.inputs if p.dtype in INDEX_DTYPES and len(p.shape) == 2
    ]
    logits = [
        p
        for p in function.outputs
        if p.dtype in ("f32", "bf16", "f16") and len(p.shape) == 3 and isinstance(p.shape[2], int)
    ]
    vocabulary_sizes = [
        high + 1
        for p in tokens
        if isinstance(high := function.index_ranges.get(p.name, (0, ""))[1], int)
    ]
    # Any other output of as many axes, such as the last hidden states, scores no tokens.
    scoring = [p for p in logits if not vocabulary_sizes or p.shape[2] in vocabulary_sizes]
    logits = [p for p in logits if p.name == "logits"] or scoring[:1]
    if len(tokens) != 1 or not logits or len(tokens[0].shape) != 2:
        ports = "; ".join(map(show_port, function.inputs))
        outputs = "; ".join(map(show_port, function.outputs))
        raise InputError(
            "only a model from tokens i64[B, S] to logits f32[B, S, vocabulary] can continue "
            f"text; this one takes {ports} and returns {outputs}: give it inputs instead of a "
            "prompt"
        )
    cached = bool(function.states)
    standard_names = {"cache_position", "position_ids"} | (set() if cached else {"attention_mask"})
    extras = tuple(p for p in function.inputs if p is not tokens[0])
    strange = [
        p for p in extras if p.name not in standard_names or p.dtype not in ("i64", "i32", "bool")
    ]
    if strange:
        raise InputError(
            f"a prompt gives no value for the input {show_port(strange[0])}: give all inputs "
            "instead"
        )
    length = tokens[0].shape[1]
    if isinstance(length, int):
        raise InputError(
            f"this model was compiled for exactly {length} tokens, and continuing text needs a "
            "sequence that may grow: compile it with a dynamic sequence"
        )
    longest = function.sizes.get(length, (0, None))[1]
    if cached:  # a text cannot be longer than a cache [B, heads, length, width]
        lengths = [p.shape[2] for p in function.states if len(p.shape) == 4]
        longest = min((n for n in (longest, *lengths) if isinstance(n, int)), default=None)
    return CausalLM(tokens[0], logits[0], extras, cached, longest)


def inputs(lm: CausalLM, text: list[int], start: int) -> dict[str, Array]:
    """The tokens from `start` on, as one batch, with the inputs that depend on their positions."""
    positions = np.arange(start, len(text))
    arrays: dict[str, Array] = {}
    for port in (lm.tokens, *lm.extras):
        if port is lm.tokens:
            array = np.array(text[start:])
        elif port.name == "attention_mask":
            array = np.ones(len(text), np.int64)
        else:
            array = positions
        shaped = array if len(port.shape) == 1 else array[None]
        arrays[port.name] = shaped.astype(
            {"i64": np.int64, "i32": np.int32, "bool": np.bool_}[port.dtype]
        )
    return arrays
