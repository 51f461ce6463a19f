"""Feeds token ids to a compiled model in pieces, as text generation does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moec.ir.aten import TORCH_DTYPES
from moec.runtime.call.executor import Executor
from moec.runtime.package import DECODE
from moec.runtime.text.texts import Texts


def feed_in_chunks(executor: Executor, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed token ids [B, S] in pieces: half of them, then one, then the rest. Yields for each piece
    its end and the logits [B, V] after it, in the dtype of the model's logits."""
    decode = executor.package.functions.get(DECODE)
    if decode is None or not ids.numel():
        return
    (port,) = decode.outputs
    length = ids.shape[1]
    texts, start = Texts(executor, len(ids), length), 0
    for stop in sorted({-(-length // 2), min(-(-length // 2) + 1, length), length}):
        logits = texts.feed(ids[:, start:stop].tolist())
        yield stop, torch.from_numpy(logits).to(TORCH_DTYPES[port.dtype])
        start = stop
