"""The embedding of a text: one vector of its last hidden states.

Texts are computed in batches, and each has the bits that it has alone. A model without a KV cache
may mix texts, or tokens with those after them: it computes one text at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from moec.errors import InputError
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, HIDDEN, carries
from moec.runtime.text.causal_lm import causal_lm, inputs
from moec.runtime.text.texts import PIECE, fit_together

Pooling: TypeAlias = Literal["mean", "last"]


def embed(
    executor: Executor, texts: Sequence[Sequence[int]], pooling: Pooling
) -> Iterator[tuple[int, Array]]:
    """Iterates over the index of a text and its embedding f32[D] of length 1, in the order of their
    computation: the mean of the hidden states of all tokens, or that of the last.

    Raises InputError, before anything runs, for the first text without tokens, or with wrong ones.
    """
    port = causal_lm(executor.package.main).tokens
    limit = executor.package.functions[HIDDEN].index_ranges.get(port.name, (0, None))[1]
    for index, text in enumerate(texts):
        if not len(text):
            raise InputError(f"text {index} has no tokens; give at least one")
        wrong = next((t for t in text if t < 0 or (isinstance(limit, int) and t > limit)), None)
        if wrong is not None:
            raise InputError(f"text {index} has the token {wrong}; the model's are 0 to {limit}")
    for batch in _batches(executor, [len(text) for text in texts]):
        states = _hidden(executor, [texts[index] for index in batch])
        for index, rows in zip(batch, states, strict=True):
            rows = rows[: len(texts[index])].astype(np.float32)
            row = rows[-1] if pooling == "last" else rows.mean(0)
            yield index, row / max(float(np.linalg.norm(row)), np.finfo(np.float32).tiny)


def _batches(executor: Executor, sizes: Sequence[int]) -> list[list[int]]:
    """The indices of the texts of each call, which has at most PIECE tokens, or one text."""
    package, hidden = executor.package, executor.package.functions[HIDDEN]
    size = causal_lm(package.main).tokens.shape[0]
    bound = size if isinstance(size, int) else hidden.sizes.get(size, (1, 1))[1]
    most = (PIECE if bound is None else bound) if package.generation is not None else 1
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        batch = [*batches[-1], index]
        fits = len(batch) <= most and len(batch) * sizes[index] <= PIECE
        lengths = [sizes[n] for n in batch] if fits else []
        if len(batch) == 1 or (fits and fit_together(lengths, carries(package.functions[DECODE]))):
            batches[-1] = batch
        else:
            batches.append([index])
    return batches


def _hidden(executor: Executor, texts: Sequence[Sequence[int]]) -> Array:
    """The last hidden states [texts, tokens, D] of texts that are padded at the end."""
    lm, longest = causal_lm(executor.package.main), max(texts, key=len)
    arrays = inputs(lm, list(longest), 0)
    for name, array in arrays.items():
        if array.ndim > 1:
            arrays[name] = np.repeat(array, len(texts), axis=0)
    for row, text in zip(arrays[lm.tokens.name], texts, strict=True):
        row[:] = 0
        row[: len(text)] = text
    (states,) = executor(arrays, HIDDEN).values()
    return np.asarray(states)
