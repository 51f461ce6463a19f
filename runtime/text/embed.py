"""The embedding of a text: one vector of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from moec.errors import InputError
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.package import HIDDEN
from moec.runtime.text.causal_lm import causal_lm, inputs

Pooling: TypeAlias = Literal["mean", "last"]


def embed(executor: Executor, tokens: Sequence[int], pooling: Pooling) -> Array:
    """The mean of the hidden states of all tokens, or that of the last, f32[D] of length 1.

    Raises InputError for a text without tokens, of too many, or of wrong ones.
    """
    if not len(tokens):
        raise InputError("the text has no tokens; give at least one")
    text = inputs(causal_lm(executor.package.main), list(tokens), 0)
    (states,) = executor(text, HIDDEN).values()
    rows = states[0].astype(np.float32)
    row = rows[-1] if pooling == "last" else rows.mean(0)
    embedding: Array = row / max(float(np.linalg.norm(row)), np.finfo(np.float32).tiny)
    return embedding
