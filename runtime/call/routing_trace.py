"""Recorded routing: which experts every token chose in every MoE layer.

The file is an .npz without pickles: `ids` i16[T, L, K] (-1: no expert), `step` i32[T], `phase`
u8[T] (0 prefill, 1 decode), `request` i32[T], `experts` i32[L], the experts of each layer.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.errors import InputError
from moec.files.regular_file import whole_file

_DTYPES = {"ids": "i2", "step": "i4", "phase": "u1", "request": "i4", "experts": "i4"}


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    ids: NDArray[np.int16]
    step: NDArray[np.int32]
    phase: NDArray[np.uint8]
    request: NDArray[np.int32]
    experts: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.ids.ndim != 3:
            raise InputError(f"ids are {list(self.ids.shape)}, not [T, L, K]")
        tokens, layers, _ = self.ids.shape
        for name in ("step", "phase", "request"):
            shape = getattr(self, name).shape
            if shape != (tokens,):
                raise InputError(f"{name} is {list(shape)}; ids are of {tokens} tokens")
        if self.experts.shape != (layers,):
            raise InputError(f"experts is {list(self.experts.shape)}; ids are of {layers} layers")
        if self.ids.size and (
            int(self.ids.min()) < -1 or (self.ids >= self.experts[None, :, None]).any()
        ):
            raise InputError("ids hold an expert below -1 or above the last one of its layer")

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    def counts(self) -> list[NDArray[np.int64]]:
        """The number of rows of each expert, by layer."""
        return [
            np.bincount(ids[ids >= 0].ravel(), minlength=int(experts))
            for ids, experts in zip(self.ids.transpose(1, 0, 2), self.experts, strict=True)
        ]

    def part(self, tokens: slice) -> RoutingTrace:
        """Some of the tokens."""
        return RoutingTrace(
            self.ids[tokens],
            self.step[tokens],
            self.phase[tokens],
            self.request[tokens],
            self.experts,
        )

    def halves(self) -> tuple[RoutingTrace, RoutingTrace]:
        """The first and the second half of the tokens."""
        middle = self.tokens // 2
        return self.part(slice(0, middle)), self.part(slice(middle, None))


def of_ids(ids: NDArray[np.integer], experts: int | NDArray[np.integer]) -> RoutingTrace:
    """A trace of one step and one request, from ids [T, L, K]."""
    tokens, layers, _ = ids.shape
    return RoutingTrace(
        ids.astype(np.int16),
        np.zeros(tokens, np.int32),
        np.zeros(tokens, np.uint8),
        np.zeros(tokens, np.int32),
        np.broadcast_to(np.asarray(experts, np.int32), (layers,)).copy(),
    )


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """In one step: a failure leaves no half of a file."""
    arrays = {name: getattr(trace, name).astype(kind) for name, kind in _DTYPES.items()}
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_trace(path: Path) -> RoutingTrace:
    """Raises InputError that says what in the file is no trace."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _DTYPES if name not in file]
            if missing:
                raise InputError(
                    f"{path} is not a routing trace: it lacks {', '.join(missing)}; moec routing "
                    "FILE -o TRACE.npz converts those of other tools"
                )
            arrays = {name: file[name] for name in _DTYPES}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError):
        raise InputError(
            f"{path} is not a routing trace: it is no .npz archive of arrays of numbers"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise InputError(f"{path}: {name} is {array.dtype}, not of integers")
    try:
        return RoutingTrace(**{n: a.astype(_DTYPES[n]) for n, a in arrays.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
