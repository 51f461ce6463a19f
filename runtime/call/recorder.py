"""Records the choices of experts of a running model, as a trace of all calls of a block.

A model that was compiled with `record_routing` has a second form of `main` and of `decode`, whose
last outputs are the choices of its layers (`moec.runtime.package`). Nothing else differs: the
same kernels run in the same order, and calls outside of a recording have no overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.errors import InputError
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.dtypes import Array
from moec.runtime.package import RecordedLayer

PREFILL, DECODED = 0, 1


class Observer(Protocol):
    """Receives the choices of each call of an executor, in arrays that later calls overwrite."""

    @property
    def layers(self) -> tuple[RecordedLayer, ...]:
        """The layers of the model, as in its package."""

    def add_main(self, choices: Sequence[Array], requests: NDArray[np.int32]) -> None:
        """Add choices [T, k] of each layer, for tokens of B requests of one length each."""

    def add_decode(
        self, choices: Sequence[Array], lengths: Array, piece: int, requests: NDArray[np.int32]
    ) -> None:
        """Add the choices of a chunk of B texts, of which lengths[b] of `piece` tokens are no
        padding.

        A layer has a row for each token, [B * piece, k], or only for the last token of each text,
        [B, k], if the model needs no other; the other tokens then have no expert.
        """


@dataclass(frozen=True, eq=False)
class _Ids:
    """ids i16[T, L, K], the phase, and the request i32[T] of each token."""

    ids: NDArray[np.int16]
    phase: int
    requests: NDArray[np.int32]


class _Call(NamedTuple):
    """The arguments of `Recorder.add_decode`, or of `add_main`, which has no `lengths`. They become
    ids when a trace is asked for, because a token must not wait for that; a frozen dataclass takes
    a microsecond longer."""

    choices: list[Array]
    requests: NDArray[np.int32]
    lengths: Array | None = None
    piece: int = 1


@dataclass(eq=False)
class Recorder:
    """The choices of the calls so far. The executor adds to it, one call at a time."""

    layers: tuple[RecordedLayer, ...]
    _calls: list[_Call] = field(default_factory=list)

    def add_main(self, choices: Sequence[Array], requests: NDArray[np.int32]) -> None:
        self._calls.append(_Call(_copies(choices), requests))

    def add_decode(
        self, choices: Sequence[Array], lengths: Array, piece: int, requests: NDArray[np.int32]
    ) -> None:
        self._calls.append(_Call(_copies(choices), requests.copy(), lengths.copy(), piece))

    def _of_main(self, call: _Call) -> _Ids:
        tokens, requests = len(call.choices[0]), call.requests
        owners = np.repeat(requests, tokens // max(1, len(requests)))
        if len(owners) != tokens:  # tokens that are no multiple of the first axis
            owners = np.resize(requests[:1], tokens)
        return _Ids(self._ids(call.choices, np.arange(tokens)), PREFILL, owners)

    def _of_decode(self, call: _Call, lengths: Array) -> _Ids:
        piece = call.piece
        tokens = np.concatenate([b * piece + np.arange(n) for b, n in enumerate(lengths)])
        phase = DECODED if int(lengths.max(initial=0)) == 1 else PREFILL
        ends = np.arange(len(lengths)) * piece + np.maximum(lengths - 1, 0)
        spread = []
        for layer in call.choices:
            if len(layer) == len(lengths) * piece:
                spread.append(layer)
                continue
            rows = np.full((len(lengths) * piece, layer.shape[1]), -1, layer.dtype)
            rows[ends] = layer
            spread.append(rows)
        return _Ids(self._ids(spread, tokens), phase, np.repeat(call.requests, lengths))

    def _ids(self, choices: Sequence[Array], tokens: NDArray[np.int64]) -> NDArray[np.int16]:
        """ids [T, L, K] of the `tokens`; ids that are no expert of the layer become -1."""
        width = max(layer.shape[1] for layer in choices)
        ids = np.full((len(tokens), len(choices), width), -1, np.int16)
        for index, (chosen, layer) in enumerate(zip(choices, self.layers, strict=True)):
            rows = chosen[tokens]
            valid = (rows >= 0) & (rows < layer.experts)
            ids[:, index, : rows.shape[1]] = np.where(valid, rows, -1)
        return ids

    def trace(self) -> RoutingTrace:
        """The trace of all calls so far, one step each. Raises InputError if there was none."""
        if not self._calls:
            raise InputError("no call was recorded: run the model inside record_routing()")
        calls = [
            self._of_main(call) if call.lengths is None else self._of_decode(call, call.lengths)
            for call in self._calls
        ]
        sizes = [len(call.ids) for call in calls]
        phases = np.array([call.phase for call in calls], np.uint8)
        return RoutingTrace(
            np.concatenate([call.ids for call in calls]),
            np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            np.repeat(phases, sizes),
            np.concatenate([call.requests for call in calls]),
            np.array([layer.experts for layer in self.layers], np.int32),
        )


def _copies(choices: Sequence[Array]) -> list[Array]:
    """The arrays in memory of their own: later calls may write where these results are."""
    return [layer.copy() for layer in choices]
