"""ONNX files with keys and values as inputs and outputs: their program, and how they are compared.

com.microsoft.GroupQueryAttention could represent the attention too, with the mask as its
attention_bias. It is not used: on a CPU (ONNX Runtime 1.31, one thread, 32 and 8 heads of 128) it
took 1.05 to 1.2 times as long for one token after 128 and 1024, 1.25 times for a prompt of 128 and
0.87 times for one of 512; and it rejects several tokens of several texts after a past. Its CUDA
kernels support such a bias only without fusion, and only since ONNX Runtime's pull request 29525;
the standard Attention has fused CUDA kernels (pull request 27542).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.capture import Captured
from moec.errors import NoMatch, UnsupportedError
from moec.export.checkpoint import Transformed
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.passes.core.runner import PassResult
from moec.passes.decode import continues_text, logits_of, with_past_inputs

Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]
DECODED = 3  # tokens that are fed one by one when a file is compared


@dataclass(frozen=True)
class Content:
    """The program to write, its number of layers with keys and values, and notes where it has none
    although the model continues text."""

    program: Program
    caches: int = 0
    notes: tuple[str, ...] = ()


def content(model: Transformed, cache: bool | None) -> Content:
    """The program with a cache, where `cache` is True, or is None and the model continues text.

    Raises UnsupportedError, with the reason, where a cache is requested but not possible.
    """
    program = model.pass_results[-1].program
    if cache is False or (cache is None and not continues_text(program.graph)):
        return Content(program)
    try:
        cached_program = with_past_inputs(program)
    except NoMatch as why:
        if cache:
            raise UnsupportedError(
                f"{model.name} cannot be exported with a cache: {why}; export its whole "
                "forward with cache=False (--no-cache)"
            ) from None
        return Content(program, notes=(f"without a cache of keys and values: {why}",))
    left = [v.name for v in program.graph.outputs if v is not logits_of(program.graph)]
    notes = (f"with a cache the file gives logits, and not {', '.join(left)}",) if left else ()
    return Content(cached_program, (len(cached_program.graph.inputs) - 2) // 2, notes)


class CachedTexts:
    """A batch of texts that is fed to `run` in pieces, as users of the file do."""

    def __init__(self, program: Program, run: Run, batch: int) -> None:
        self._graph, self._run = program.graph, run
        self._mask = torch.zeros(batch, 0, dtype=torch.int64)
        self._past = empty(program, batch)

    def feed(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Feed token ids [B, S], with 0 in `mask` [B, S] for padding; returns logits [B, S, V]."""
        new = torch.ones_like(ids) if mask is None else mask
        self._mask = torch.cat([self._mask, new], 1)
        names = [value.name for value in self._graph.inputs]
        outputs = self._run(dict(zip(names, (ids, self._mask, *self._past), strict=True)))
        logits, *self._past = (outputs[value.name] for value in self._graph.outputs)
        return logits


def empty(program: Program, batch: int) -> list[torch.Tensor]:
    """The past keys and values of an empty text."""
    return [
        torch.zeros(batch, int(v.shape[1]), 0, int(v.shape[3]), dtype=TORCH_DTYPES[v.dtype])
        for v in program.graph.inputs[2:]
    ]


def at_once(program: Program, run: Run) -> Run:
    """A function that runs the complete text in one call, like the model itself."""
    tokens, logits = program.graph.inputs[0].name, program.graph.outputs[0].name

    def run_whole(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        ids = inputs[tokens]
        return {logits: CachedTexts(program, run, len(ids)).feed(ids)}

    return run_whole


def feed_in_chunks(
    program: Program, run: Run, ids: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Feed token ids [B, S]: half of them, a few one by one, then the rest. Then once more in two
    pieces that are divided differently in each text, so that both are padded, the second in
    mid-text. Yields for each piece its end, and the logits [B, V] after it."""
    batch, length = ids.shape
    if not ids.numel():
        return
    half = -(-length // 2)
    texts, start = CachedTexts(program, run, batch), 0
    for stop in sorted({*range(half, min(half + DECODED, length) + 1), length}):
        yield stop, texts.feed(ids[:, start:stop])[:, -1]
        start = stop
    if length > 1:
        texts = CachedTexts(program, run, batch)
        counts = [1 + (half - 1 + text) % (length - 1) for text in range(batch)]
        texts.feed(*_padded([row[:count] for row, count in zip(ids, counts, strict=True)]))
        rest = _padded([row[count:] for row, count in zip(ids, counts, strict=True)])
        yield length, texts.feed(*rest)[:, -1]


def _padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, S] of rows padded on the left with token 0."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).to(torch.int64)
    return ids, mask


def cases(program: Program, texts: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Inputs for the program: each complete text, and its last token after all others."""
    feeds: list[tuple[torch.Tensor, ...]] = []
    for ids in texts:
        ones, past = torch.ones_like(ids), empty(program, len(ids))
        feeds.append((ids, ones, *past))
        if ids.shape[1] > 1:
            before = [ids[:, :-1], ones[:, :-1], *past]
            _, *past = evaluate(program.graph, before, program.weights)
            feeds.append((ids[:, -1:], ones, *past))
    return feeds


def logits_alone(
    captured: Captured, pass_results: Sequence[PassResult]
) -> tuple[Captured, tuple[PassResult, ...]]:
    """The capture and the results of passes with the logits as the only output, for comparison with
    a file that returns them only."""
    graph = pass_results[-1].program.graph
    index = graph.outputs.index(logits_of(graph))

    def keep_logits(program: Program) -> Program:
        return replace(
            program, graph=replace(program.graph, outputs=(program.graph.outputs[index],))
        )

    def eager(*case: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (captured.eager(*case)[index],)

    logits_capture = replace(captured, program=keep_logits(captured.program), eager=eager)
    return logits_capture, tuple(
        replace(pass_result, program=keep_logits(pass_result.program))
        for pass_result in pass_results
    )
