"""Whether a model that continues text computes in pieces what it computes at once.

The pieces go through the runtime's own `Texts`, into the graph of `decode` in float32, with caches
in float32: positions, slots, lengths and masks count, and no rounding does. That kernels compute
what this graph means, `moec.verify.code` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moec.capture import Captured
from moec.errors import InputError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Program, State
from moec.ir.interpret.run_in_float32 import in_float32, wide
from moec.oracle.rounding import FLOAT32_NOISE, rows_beyond
from moec.oracle.table_ids import nonzero_rows
from moec.runtime.call.caches import Cache
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, Generation, Package, carries
from moec.runtime.text.texts import Decoder, Texts
from moec.verify.references import LIMIT, SAMPLES, exact_eager

PIECES = ((3, 1), (1, 1), (58, 59), *[(1, 1)] * 4)
"""New tokens of each of two texts: unequal pieces, and steps of one token at the start and around
64, where attention changes its kernel's blocks."""


FEW_PIECES = ((64, 65), (1, 1))
"""Where weights are read from files for each piece."""


def _within_context(
    pieces: Sequence[tuple[int, int]], package: Package
) -> Iterator[tuple[int, int]]:
    """Pieces as far as the context reaches; equal ones for recurrent states."""
    decode = package.functions[DECODE]
    _, longest = decode.sizes.get(str(decode.inputs[0].shape[1]), (0, None))
    total = 0
    for piece in pieces:
        total += max(piece)
        if longest is not None and total > longest:
            return
        yield (max(piece), max(piece)) if carries(decode) else piece


def feed_pieces(
    decoder: Decoder,
    pieces: Sequence[tuple[int, int]] = PIECES,
    prepare: Callable[[Texts], None] = lambda texts: None,
    tokens: Array | None = None,
) -> Iterator[tuple[torch.Tensor, list[int], Array]]:
    """Feed random tokens (of `tokens`, if given) to two texts in pieces: all tokens i64[2, S], and
    for each piece the texts' lengths and logits [2, V] after it. `prepare` is called first."""
    package = decoder.package
    assert package.generation is not None
    pieces = list(_within_context(pieces, package))
    room = sum(max(piece) for piece in pieces)
    of = package.generation.vocabulary if tokens is None or not len(tokens) else tokens
    ids = np.random.default_rng(0).choice(of, (2, max(room, 1)))
    texts, lengths = Texts(decoder, 2, max(room, 1)), [0, 0]
    prepare(texts)
    for piece in pieces:
        stops = [length + new for length, new in zip(lengths, piece, strict=True)]
        parts = [row[a:b].tolist() for row, a, b in zip(ids, lengths, stops, strict=True)]
        logits, lengths = texts.feed(parts), stops
        yield torch.from_numpy(ids), lengths, logits


@dataclass(eq=False)
class InterpretedDecoder:
    """The graph of `decode` in float32, in the place of an Executor."""

    holds_all_texts: ClassVar[bool] = True
    account: ClassVar[None] = None
    package: Package
    program: Program

    def __post_init__(self) -> None:
        self._run = in_float32(self.program)

    @property
    def _states(self) -> Sequence[State]:
        return self.program.graph.states

    def number_requests(self, count: int) -> Array:
        return np.arange(count, dtype=np.int32)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        def zeros(state: State) -> torch.Tensor:
            sizes = [room if not isinstance(n, int) else n for n in state.before.shape[1:]]
            return torch.zeros((texts, *sizes), dtype=wide(TORCH_DTYPES[state.before.dtype]))

        return [Cache(zeros(state)) for state in self._states]

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """See `Executor.decode`."""
        before = {state.before for state in self._states}
        names = [value for value in self.program.graph.inputs if value not in before]
        tensors = dict(zip(names, map(torch.from_numpy, counts), strict=True))
        held = {s.before: cache.tensor for s, cache in zip(self._states, caches, strict=True)}
        logits, *after = self._run([{**tensors, **held}[v] for v in self.program.graph.inputs])
        for cache, tensor in zip(caches, after, strict=True):
            cache.tensor[...] = tensor
        scores: Array = logits.float().numpy()
        return scores


def check_texts(
    captured: Captured,
    program: Program,
    package: Package,
    output: int,
    pieces: Sequence[tuple[int, int]] = PIECES,
) -> str:
    """Compare the texts in pieces with the module in float32, whose logits are its `output`: a
    sentence where they differ, or ""."""
    decoder, generation = InterpretedDecoder(package, program), package.generation
    assert isinstance(generation, Generation)
    try:
        tokens = nonzero_rows(captured.program, captured.program.graph.inputs[0]).numpy()
        tokens = tokens[tokens < generation.vocabulary]
        fed = list(feed_pieces(decoder, pieces, tokens=tokens))
    except InputError as error:
        return f"texts in pieces are refused: {error}"
    if not fed:
        return ""
    ids = fed[-1][0]
    exact = exact_eager(captured)(ids)[output]
    ours = torch.cat([torch.from_numpy(logits) for _, _, logits in fed])
    positions = [(row, length - 1) for _, lengths, _ in fed for row, length in enumerate(lengths)]
    expected = torch.stack([exact[at] for at in positions]).float()
    beyond = rows_beyond([[ours]], [[expected]], LIMIT)
    seeds = iter(range(SAMPLES))
    while beyond is not None and (seed := next(seeds, None)) is not None:
        moved = exact_eager(captured, FLOAT32_NOISE, seed)(ids)[output]
        beyond = beyond.explained_by([[torch.stack([moved[at] for at in positions])]])
    if beyond is None:
        return ""
    errors = beyond.errors[0]
    row, last = positions[int(errors.argmax())]
    return (
        f"in pieces, the logits after {last + 1} tokens of text {row} differ by "
        f"{float(errors.max()):.1e} of their greatest from the module's in float32, as do "
        f"{int((errors > LIMIT).sum())} of {len(positions)} rows: the graph of decode is wrong, or "
        "positions, slots and lengths that it is given"
    )
