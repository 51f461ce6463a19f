"""`generate` and `stream` of a compiled model, fresh or loaded."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from moec.errors import InputError, UsageError
from moec.runtime.executor import Executor
from moec.runtime.generate import Request, generate, slow
from moec.runtime.sampling import Sampling
from moec.spelling import did_you_mean

Prompts: TypeAlias = Any
"""Token ids: a tensor or array [B, S], or a list of them for each text, of any lengths."""


OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def request_of(
    executor: Executor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: int | Sequence[int] | None = None,
) -> Request:
    """Raises InputError for an option that is of another type, or out of range."""
    if stop is None:
        generation = executor.package.generation
        stop = generation.stop if generation is not None else ()
    stops: Any = (stop,) if _is_id(stop) else stop
    if not isinstance(stops, Collection) or not all(map(_is_id, stops)):
        raise InputError(f"stop is {stop!r}; it must be a token, or a list of tokens")
    sampling = Sampling(temperature, top_p, top_k, seed)
    return Request(max_new_tokens, sampling, frozenset(map(int, stops)))


def continued(executor: Executor, prompts: Prompts, **options: Any) -> Any:
    """The prompts with their new tokens: a list of lists for lists, else a tensor or array
    [B, S + N] of the kind that was given, where a text that ended is filled up with the token
    that ended it (its last one, where the model took no more)."""
    texts = texts_of(prompts)
    results: list[list[int]] = [list(text) for text in texts]
    for tokens in stream(executor, texts, **options):
        for text, token in zip(results, tokens, strict=True):
            if token is not None:
                text.append(token)
    if isinstance(prompts, list | tuple):
        return results
    most = max(map(len, results))
    filled = np.array([text + [text[-1]] * (most - len(text)) for text in results], np.int64)
    torch = sys.modules.get("torch")
    is_torch = torch is not None and isinstance(prompts, torch.Tensor)
    return torch.from_numpy(filled) if torch is not None and is_torch else filled


def stream(
    executor: Executor, prompts: Prompts, **options: Any
) -> Iterator[tuple[int | None, ...]]:
    """The next token of each text as it comes; None for a text that has ended."""
    if unknown := [name for name in options if name not in OPTIONS]:
        near = did_you_mean(unknown[0], OPTIONS) or f"; the options are {', '.join(OPTIONS)}"
        raise UsageError(f"text is generated without an option {unknown[0]!r}{near}")
    request = request_of(executor, **options)
    if why := slow(executor):
        warnings.warn(f"each token runs the whole text again: {why}", stacklevel=3)
    return generate(executor, texts_of(prompts), request)


def texts_of(prompts: Prompts) -> list[list[int]]:
    """Raises InputError where `prompts` are not token ids."""
    if isinstance(prompts, list | tuple):
        rows = list(prompts)
        if rows and all(_is_id(row) for row in rows):
            raise InputError("the prompts are one list of token ids: give a list of such lists")
    elif getattr(prompts, "ndim", None) == 2:
        rows = list(np.asarray(prompts))
    else:
        shape = getattr(prompts, "shape", None)
        what = f"{type(prompts).__name__} {list(shape)}" if shape is not None else repr(prompts)
        raise InputError(
            f"the prompts are a {what}, expected token ids [B, S] or a list of lists of them"
        )
    return [_text(row, number) for number, row in enumerate(rows)]


def _text(row: Any, number: int) -> list[int]:
    ids = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(ids, list | tuple) or not all(_is_id(token) for token in ids):
        raise InputError(f"prompt {number} is {row!r}, expected a list of token ids")
    return [int(token) for token in ids]


def _is_id(token: Any) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
