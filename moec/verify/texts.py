"""Whether a model that continues text computes in pieces what it computes at once.

The pieces go through the runtime's own `Texts`, into the graph of `decode` in float32, with caches
in float32: positions, slots, lengths and masks count, and no rounding does. That kernels compute
what this graph means, `moec.verify.code` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from moec.capture import Captured
from moec.errors import InputError, VerificationError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Module, Program, State
from moec.ir.interpret.run_in_float32 import in_float32, wide, widened
from moec.oracle.rounding import FLOAT32_NOISE, rows_beyond
from moec.oracle.table_ids import nonzero_rows
from moec.runtime.call.caches import Cache
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, Generation, Package, carries
from moec.runtime.text.texts import Decoder, Texts
from moec.verify.references import LIMIT, SAMPLES, exact_eager

Pieces: TypeAlias = Sequence[tuple[int, int]]
"""New tokens of each of two texts, piece by piece."""
_STEPS = (66, 130, 514)
"""Up to these lengths tokens come one by one: attention changes its kernel's blocks before them."""
_MOST_TOKENS = 2048
"""The end of the context counts as one of them, where it is no further."""
_WORK = 1 << 33
"""Weights times tokens that are evaluated for it: more than 66 tokens only in small models."""


def stops_of(generation: Generation) -> list[int]:
    """The lengths of texts up to which tokens come one by one, from three before."""
    longest = generation.longest or _MOST_TOKENS
    ends = () if generation.longest is None else (longest,)
    return sorted(stop for stop in {*_STEPS, *ends} if stop <= min(longest, _MOST_TOKENS))


def pieces_of(package: Package, weights: int | None = None, *, few: bool = False) -> Pieces:
    """Unequal pieces, and steps of one token at the start and up to each of `stops_of`, as far as
    the work for so many weights allows, by default the first; equal ones for recurrent states.
    `few` are two, where weights are read from files for each."""
    assert package.generation is not None
    most, stops = _WORK // weights if weights else 0, stops_of(package.generation)
    lengths = [(3, 1), (4, 2)]
    for stop in (stop for stop in stops if stop < most or stop == stops[0]):
        lengths += [(n, n - 1) for n in range(stop - 3, stop + 1) if n > lengths[-1][0]]
    equal, lengths = carries(package.functions[DECODE]), lengths[-2:] if few else lengths
    pairs = [(a, a if equal else b) for a, b in lengths if a <= stops[-1]] or [(1, 1)]
    return [(c - a, d - b) for (a, b), (c, d) in pairwise([(0, 0), *pairs])]


def feed_pieces(
    decoder: Decoder,
    pieces: Pieces,
    prepare: Callable[[Texts], None] = lambda texts: None,
    tokens: Array | None = None,
) -> Iterator[tuple[torch.Tensor, list[int], Array]]:
    """Feed random tokens (of `tokens`, if given) to two texts in pieces: all tokens i64[2, S], and
    for each piece the texts' lengths and logits [2, V] after it. `prepare` is called first."""
    generation = decoder.package.generation
    assert generation is not None
    room = max(map(sum, zip(*pieces, strict=True)))
    of = generation.vocabulary if tokens is None or not len(tokens) else tokens
    ids = np.random.default_rng(0).choice(of, (2, room))
    texts, lengths = Texts(decoder, 2, room), [0, 0]
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
        few = sum(w.numel() for w in self.program.weights.values()) <= 1 << 28
        # 1 GB in float32; of more weights, each is cast for each piece
        self._run = in_float32(widened(Module.of(self.program)).main if few else self.program)

    def number_requests(self, count: int) -> Array:
        return np.arange(count, dtype=np.int32)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        def zeros(state: State) -> torch.Tensor:
            sizes = [room if not isinstance(n, int) else n for n in state.before.shape[1:]]
            return torch.zeros((texts, *sizes), dtype=wide(TORCH_DTYPES[state.before.dtype]))

        return [Cache(zeros(state)) for state in self.program.graph.states]

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """See `Executor.decode`."""
        before = [state.before for state in self.program.graph.states]
        names = [value for value in self.program.graph.inputs if value not in before]
        tensors = dict(zip(names, map(torch.from_numpy, counts), strict=True))
        held = {v: cache.tensor for v, cache in zip(before, caches, strict=True)}
        logits, *after = self._run([{**tensors, **held}[v] for v in self.program.graph.inputs])
        for cache, tensor in zip(caches, after, strict=True):
            cache.tensor[...] = tensor
        scores: Array = logits.float().numpy()
        return scores


def check_texts(captured: Captured, decoder: Decoder, output: int, pieces: Pieces) -> str:
    """Compare the texts in pieces with the module in float32, whose logits are its `output`: a
    line for the report. Raises VerificationError where they differ."""
    generation = decoder.package.generation
    assert isinstance(generation, Generation)
    try:
        tokens = nonzero_rows(captured.program, captured.program.graph.inputs[0]).numpy()
        tokens = tokens[tokens < generation.vocabulary]
        fed = list(feed_pieces(decoder, pieces, tokens=tokens))
    except InputError as error:
        raise VerificationError(f"texts in pieces are refused: {error}") from None
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
        words = f"{len(pieces)} pieces of two texts give what the module gives at once"
        return f"texts: {words}, to token {ids.shape[1]:,}"
    errors = beyond.errors[0]
    row, last = positions[int(errors.argmax())]
    raise VerificationError(
        f"in pieces, the logits after {last + 1} tokens of text {row} differ by "
        f"{float(errors.max()):.1e} of their greatest from the module's in float32, as do "
        f"{int((errors > LIMIT).sum())} of {len(positions)} rows: the graph of decode is wrong, or "
        "positions, slots and lengths that it is given"
    )
