"""Text generation with a compiled causal language model.

If the model has the function `decode`, an engine continues all texts; on the ranks of a plan, which
share the texts, all texts take the same steps. A model that was captured with a cache uses it. Any
other model processes the entire text for each token; `slow` returns the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moec.errors import InputError
from moec.runtime.dtypes import Array
from moec.runtime.text.beams import BeamEngine
from moec.runtime.text.causal_lm import CausalLM, causal_lm, inputs
from moec.runtime.text.engine import FAILED, Engine
from moec.runtime.text.request import Request
from moec.runtime.text.sampler import Sampler
from moec.runtime.text.texts import Decoder, Texts

Feed = Callable[[Sequence[Sequence[int]]], Array]
"""Appends tokens to each text, and returns the logits f32[texts, V] after the last of each."""


@runtime_checkable
class Whole(Protocol):
    """Runs an entire text in one call: an Executor."""

    def reset(self) -> None:
        """Reset the caches to those that the model was captured with."""

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Any]:
        """The outputs of `main`, by name."""


def slow(executor: Decoder) -> str:
    """The reason why each token takes a run over the entire text; "" if it does not."""
    package = executor.package
    return "" if package.generation or package.main.states else package.no_generation


def longest_of(executor: Decoder) -> int | None:
    """The greatest number of tokens of a text; None without a limit."""
    generation = executor.package.generation
    return generation.longest if generation else causal_lm(executor.package.main).longest


def generate(
    executor: Decoder, prompts: Sequence[Sequence[int]], request: Request
) -> Iterator[tuple[int | None, ...]]:
    """Iterates over the next tokens of all texts; None for a text that has ended.

    A text ends with a token of `stop`, after `most` tokens, or at the model's greatest length.
    With several beams there are as many texts as are returned for each prompt, best first.
    Raises InputError where a prompt is empty or longer than that.
    """
    _check(executor, prompts, request)
    if executor.package.generation is not None and executor.holds_all_texts:
        yield from _by_engine(executor, prompts, request)
        return
    if request.guesses or request.draft is not None or request.beams.count > 1:
        what = "a draft was given" if request.draft else f"speculate is {request.guesses}"
        what = f"num_beams is {request.beams.count}" if request.beams.count > 1 else what
        raise InputError(f"{what}, and this model has no KV cache of its own process: leave it out")
    limit = longest_of(executor)
    room = max(len(prompt) + request.most for prompt in prompts)
    feed = _feed(executor, prompts, room if limit is None else min(room, limit))
    streams = request.streams or range(len(prompts))
    samplers = [Sampler(request, p, n) for p, n in zip(prompts, streams, strict=False)]
    lengths = [len(prompt) for prompt in prompts]
    fresh: list[Sequence[int]] = list(prompts)
    open_ = [True] * len(prompts)
    for _ in range(request.most):
        open_ = [o and (limit is None or n <= limit) for o, n in zip(open_, lengths, strict=True)]
        if not any(open_):
            return
        logits = feed([new_tokens if o else () for new_tokens, o in zip(fresh, open_, strict=True)])
        tokens: list[int | None] = []
        for text, (sampler, row) in enumerate(zip(samplers, logits, strict=True)):
            if not open_[text]:
                tokens.append(None)
                continue
            try:
                token, complete = sampler.draw(row)
            except InputError as error:
                raise InputError(f"after {lengths[text]} tokens: {error}") from error
            tokens.append(token)
            fresh[text], open_[text] = [token], not complete
            lengths[text] += 1
        yield tuple(tokens)


def _by_engine(
    executor: Decoder, prompts: Sequence[Sequence[int]], request: Request
) -> Iterator[tuple[int | None, ...]]:
    limit = longest_of(executor)
    mosts = [min(request.most, limit + 1 - len(p)) if limit else request.most for p in prompts]
    room = max(len(p) + most - 1 for p, most in zip(prompts, mosts, strict=True))
    engine = engine_for(executor, len(prompts), room, request)
    streams = request.streams or range(len(prompts))
    texts = [
        engine.submit(prompt, replace(request, most=most, least=min(request.least, most)), stream)
        for prompt, most, stream in zip(prompts, mosts, streams, strict=False)
    ]
    if isinstance(engine, BeamEngine):
        yield from zip_longest(*engine.search(texts))
        return
    for count in range(max(mosts)):
        while any(not text.end and len(text.tokens) <= count for text in texts):
            engine.step()
        for text in texts:
            if text.end == FAILED and len(text.tokens) == count:
                text.raise_cause()
        tokens = [text.tokens[count] if count < len(text.tokens) else None for text in texts]
        if not any(token is not None for token in tokens):
            return
        yield tuple(tokens)


def engine_for(executor: Decoder, slots: int, room: int, request: Request) -> Engine:
    """An engine for texts that are continued as requested, in as few steps as possible."""
    if request.beams.count > 1:
        return BeamEngine(executor, slots, room, request.beams)
    return Engine(executor, slots, room, prompts_first=True)


def vocabulary_of(executor: Decoder) -> int:
    """The number of the model's tokens. Raises InputError where it continues no texts."""
    generation = executor.package.generation
    if generation:
        return generation.vocabulary
    return int(causal_lm(executor.package.main).logits.shape[2])


def _check(executor: Decoder, prompts: Sequence[Sequence[int]], request: Request) -> None:
    longest, vocabulary = longest_of(executor), vocabulary_of(executor)
    if not prompts:
        raise InputError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not len(prompt):
            raise InputError(f"{which} has no tokens; give at least one")
        if longest is not None and len(prompt) > longest:
            raise InputError(
                f"{which} has {len(prompt)} tokens, and the model takes at most {longest}"
            )
        request.check_ids(prompt, vocabulary)


def _feed(executor: Decoder, prompts: Sequence[Sequence[int]], room: int) -> Feed:
    if executor.package.generation is not None:
        return Texts(executor, len(prompts), room).feed
    if not isinstance(executor, Whole):
        raise InputError(
            "several ranks continue text with the function `decode`, which this plan does not have"
        )
    lm = causal_lm(executor.package.main)
    if lm.cached and len(prompts) > 1:
        raise InputError(
            f"{len(prompts)} prompts, and the model's own cache is for one: give one at a time"
        )
    executor.reset()
    return partial(_run_afresh, executor, lm, [[] for _ in prompts])


def _run_afresh(
    executor: Whole, lm: CausalLM, texts: list[list[int]], tokens: Sequence[Sequence[int]]
) -> Array:
    """Runs each text from its start, or from the end of the model's own cache."""
    rows: list[Array] = []
    for text, new_tokens in zip(texts, tokens, strict=True):
        start = len(text) if lm.cached else 0
        text += new_tokens
        if new_tokens:
            logits = executor(inputs(lm, text, start))[lm.logits.name]
            rows.append(logits[0, -1].astype(np.float32))
        else:
            rows.append(np.zeros(0, np.float32))
    width = max(row.size for row in rows)
    return np.stack([row if row.size else np.zeros(width, np.float32) for row in rows])
