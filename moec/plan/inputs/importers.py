"""Reads routing that other tools recorded: SGLang, vLLM and EPLB, MoE-Infinity, JSON lines.

Counts have how often each expert was chosen; only traces have the experts of each token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import InputError
from moec.files.regular_file import read_regular
from moec.runtime.call.routing_trace import RoutingTrace, load_trace, of_ids


@dataclass(frozen=True)
class ImportedRouting:
    """`counts[l]` [E_l] of each MoE layer, and a trace if tokens were recorded."""

    counts: tuple[NDArray[np.float64], ...]
    trace: RoutingTrace | None
    source: str

    @property
    def rows(self) -> int:
        """The total number of choices."""
        return int(sum(count.sum() for count in self.counts))


def read_routing(path: Path) -> ImportedRouting:
    """Reads a file by its suffix: .npz of moec; .npy with counts [L, E] or [requests, L, E]
    (MoE-Infinity); .json with `logical_count`; .jsonl of {layer_idx, token_idx, selected_ids}; .pt
    of SGLang.

    Raises InputError with what is missing in the file, and where nothing was recorded.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    routing = _read(path)
    if not routing.rows:
        raise InputError(f"{path}: no expert was chosen: it has no routing to show or to plan for")
    return routing


def _read(path: Path) -> ImportedRouting:
    match path.suffix:
        case ".npz":
            return of_trace(load_trace(path), "moec")
        case ".npy":
            return _of_counts(_array(path), path, "counts")
        case ".json":
            return _of_json(path)
        case ".jsonl":
            return _of_lines(path)
        case ".pt":
            return _of_sglang(path)
    raise InputError(f"{path}: routing is read from .npz, .npy, .json, .jsonl and .pt files")


def of_trace(trace: RoutingTrace, source: str) -> ImportedRouting:
    return ImportedRouting(tuple(count.astype(float) for count in trace.counts()), trace, source)


def _array(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, OSError):
        raise InputError(f"{path} is not an array of numbers that numpy wrote") from None


def _of_counts(array: NDArray[Any], path: Path, source: str) -> ImportedRouting:
    """Counts [L, E], or [steps or requests, L, E], which are summed over the first axis."""
    if array.ndim == 3:
        array = array.sum(axis=0)
    if array.ndim != 2 or array.dtype.kind not in "iuf" or not array.size:
        raise InputError(f"{path}: counts are [layers, experts], not {list(array.shape)}")
    counts = array.astype(float)
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise InputError(f"{path}: a count is negative or not a number")
    return ImportedRouting(tuple(counts), None, source)


def _of_json(path: Path) -> ImportedRouting:
    content = _json(read_regular(path), path)
    counts = content.get("logical_count") if isinstance(content, Mapping) else content
    if not isinstance(counts, Sequence):
        raise InputError(f"{path} has no logical_count [layers, experts]")
    try:
        array = np.array(counts, float)
    except (ValueError, TypeError):
        raise InputError(f"{path}: logical_count is not an array of numbers") from None
    return _of_counts(array, path, "logical_count of SGLang or vLLM")


def _json(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None


def _of_lines(path: Path) -> ImportedRouting:
    """One record for every token and layer, all with equal numbers of ids."""
    chosen: dict[tuple[int, int], list[int]] = {}
    for number, line in enumerate(read_regular(path).splitlines(), 1):
        if not line.strip():
            continue
        record = _json(line, path)
        try:
            key = int(record["token_idx"]), int(record["layer_idx"])
            chosen[key] = [int(expert) for expert in record["selected_ids"]]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}, line {number}: no layer_idx, token_idx and selected_ids"
            ) from None
    if not chosen:
        raise InputError(f"{path} has no record")
    tokens, layers = (sorted({key[axis] for key in chosen}) for axis in (0, 1))
    widths = {len(ids) for ids in chosen.values()}
    if len(widths) != 1 or len(chosen) != len(tokens) * len(layers):
        raise InputError(f"{path}: not every token has the same number of experts in every layer")
    ids = np.array([[chosen[token, layer] for layer in layers] for token in tokens])
    return of_trace(_checked(ids, path), "records a line")


def _checked(ids: NDArray[Any], path: Path) -> RoutingTrace:
    """A trace of ids [T, L, K]. The number of experts is not recorded and assumed to be the
    greatest id + 1. Raises InputError for ids of another shape or dtype, or out of range."""
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        shape = list(ids.shape)
        raise InputError(f"{path}: ids are {shape} of {ids.dtype}, not integers [T, L, K]")
    if ids.size == 0 or int(ids.min()) < -1 or int(ids.max()) > np.iinfo(np.int16).max:
        most = np.iinfo(np.int16).max
        raise InputError(f"{path}: ids must be from -1 to {most}, and there must be some")
    return of_ids(ids, int(ids.max()) + 1)


def _of_sglang(path: Path) -> ImportedRouting:
    """A dump of SGLang's recorder: `logical_count` (stat), or records with `topk_ids_of_layer`
    (per_token) or `global_physical_count` and a map (per_pass)."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError):
        raise InputError(
            f"{path} is not a dump of SGLang's recorder: torch.load(weights_only=True) refuses it"
        ) from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is not a dump of SGLang's recorder: it has no dictionary")
    if "logical_count" in content:
        return _of_counts(np.asarray(content["logical_count"]), path, "SGLang, stat")
    records = content.get("records")
    if not isinstance(records, Sequence) or not records:
        raise InputError(f"{path} has neither logical_count nor records")
    if isinstance(records[0], Mapping) and "topk_ids_of_layer" in records[0]:
        try:
            parts = [np.asarray(record["topk_ids_of_layer"]) for record in records]
            ids = np.concatenate(parts, axis=1).transpose(1, 0, 2)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: topk_ids_of_layer of all records must be [layers, tokens, k]"
            ) from None
        return of_trace(_checked(ids, path), "SGLang, per_token")
    return _of_counts(_logical(content, records, path), path, "SGLang, per_pass")


def _logical(content: Mapping[str, Any], records: Sequence[Any], path: Path) -> NDArray[Any]:
    """Counts of experts from counts of slots."""
    try:
        slots = sum(np.asarray(record["global_physical_count"], float) for record in records)
        table = np.asarray(content["last_physical_to_logical_map"], np.int64)
    except (LookupError, TypeError, ValueError):
        raise InputError(f"{path}: records without global_physical_count, or no map") from None
    physical = np.asarray(slots)
    if table.shape != physical.shape or int(table.min()) < 0:
        raise InputError(f"{path}: the map is {table.shape}, the counts are {physical.shape}")
    counts = np.zeros((len(table), int(table.max()) + 1))
    for layer, row in enumerate(table):
        np.add.at(counts[layer], row, physical[layer])
    return counts
