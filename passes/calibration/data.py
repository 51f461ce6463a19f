"""Calibration data: the inputs on which approximate passes decide and are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.errors import InputError, IRError, MoecError, SetupError
from moec.files.regular_file import read_regular
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Program, Value
from moec.ir.sizes.dims import bind_shape
from moec.oracle.table_ids import table_rows
from moec.passes.calibration.files import data_by_domain, data_label

LENGTH = 256
WINDOWS = 16
TOKENS_A_CASE = 2048

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs of a program without its states, in cases that are small enough to run at once.
    `tokens` counts the elements of the first input, without the last axis of floats; `domains` is
    the domain of each case, empty if none are named."""

    cases: tuple[Inputs, ...]
    tokens: int
    domains: tuple[str, ...] = ()


def load_calibration(
    calib: Any,
    program: Program,
    files: Mapping[str, bytes],
    windows: int = WINDOWS,
    parts: int = 1,
) -> Calibration:
    """The calibration data of a program. `files` are its source's files, perhaps with a tokenizer.

    A .txt file gives at most `windows` windows of at most 256 tokens, evenly spaced over the text.
    Data of a size that varies are at least `parts` cases, if they have so many sequences. Raises
    UsageError for data that do not match the program's inputs.
    """
    cases: list[Inputs] = []
    domains: list[str] = []
    tokens = 0
    for name, data in data_by_domain(calib).items():
        where = data_label(name, data)
        domain_cases, count = _load_domain(data, where, program, files, windows, parts)
        cases += domain_cases
        domains += [name] * len(domain_cases) if name else []
        tokens += count
    return Calibration(tuple(cases), tokens, tuple(domains))


def _load_domain(
    calib: Any, where: str, program: Program, files: Mapping[str, bytes], windows: int, parts: int
) -> tuple[list[Inputs], int]:
    """The cases, and how many tokens they hold."""
    graph = program.graph
    before = {state.before for state in graph.states}
    inputs = [value for value in graph.inputs if value not in before]
    if isinstance(calib, str | Path) and Path(calib).suffix == ".txt":
        tensors = {inputs[0].name: _tokens(Path(calib), where, graph, inputs, files, windows)}
    else:
        tensors = _tensors(calib, where, inputs)
    batch = tuple(_input_tensor(value, tensors, where, graph) for value in inputs)
    sizes: dict[str, int] = {}
    for value, tensor in zip(inputs, batch, strict=True):
        try:
            bind_shape(value.shape, tuple(tensor.shape), sizes)
        except IRError as error:
            raise SetupError(f"{where}: {value.name} is not {value.type}: {error}") from None
    for name, size in sizes.items():
        limits = graph.bounds.get(name)
        if limits and (size < limits.low or (limits.high is not None and size > limits.high)):
            # The number of sequences is split below, each part within the limits.
            if name != _batch(inputs) or size < limits.low:
                raise SetupError(
                    f"{where}: size {name} is {size}, the model takes {limits.low} to {limits.high}"
                )
    return _cases(batch, inputs, graph, parts), tokens_in(inputs[0], batch[0])


def tokens_in(value: Value, tensor: torch.Tensor) -> int:
    """The number of tokens of an input: its elements, not counting the last axis of floats."""
    return tensor.numel() // (tensor.shape[-1] if value.dtype in FLOATS and tensor.ndim > 1 else 1)


def _batch(inputs: list[Value]) -> str | None:
    """The name of the first axis if all inputs share it, else None."""
    first = {value.shape[0] if value.shape else 1 for value in inputs}
    return str(first.pop()) if len(first) == 1 and not isinstance(next(iter(first)), int) else None


def _cases(batch: Inputs, inputs: list[Value], graph: Graph, least: int) -> list[Inputs]:
    name = _batch(inputs)
    if name is None or name not in graph.bounds:
        return [batch]
    each = max(1, tokens_in(inputs[0], batch[0][:1]))
    high = graph.bounds[name].high
    count = min(TOKENS_A_CASE // each, -(-len(batch[0]) // least))
    count = max(graph.bounds[name].low, count, 1)
    count = min(count, high) if high is not None else count
    split = [torch.split(tensor, count) for tensor in batch]
    cases = list(zip(*split, strict=True))
    short = len(cases) > 1 and len(cases[-1][0]) < graph.bounds[name].low
    return cases[:-1] if short else cases


def _tokens(
    path: Path,
    where: str,
    graph: Graph,
    inputs: list[Value],
    files: Mapping[str, bytes],
    windows: int,
) -> torch.Tensor:
    value = inputs[0]
    if len(inputs) > 1 or value.dtype not in INDEX_DTYPES or len(value.shape) != 2:
        names = ", ".join(map(repr, inputs))
        raise SetupError(
            f"{where}: a text is one input of token ids [B, S], and the model takes {names}; give "
            "the inputs by name in an .npz or .safetensors"
        )
    from moec.runtime.text.prompt import load_tokenizer

    try:
        tokenizer = load_tokenizer(files)
    except MoecError:
        raise SetupError(
            f"{where}: the model has no tokenizer.json to encode a text; give token ids in an "
            ".npz or .safetensors"
        ) from None
    try:
        text = read_regular(path).decode()
    except UnicodeDecodeError:
        raise SetupError(f"{where}: it is not UTF-8 text") from None
    ids = torch.tensor(tokenizer.encode(text) if text else [], dtype=torch.int64)
    axis = value.shape[1]
    high = axis if isinstance(axis, int) else graph.bounds[str(axis)].high
    length = high if isinstance(axis, int) else min(LENGTH, high or LENGTH)
    assert isinstance(length, int)
    if len(ids) < length:
        raise SetupError(
            f"{where}: the text has {len(ids)} tokens, and one window needs {length}; give more"
        )
    batch = value.shape[0]
    count = batch if isinstance(batch, int) else min(windows, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.stack([ids[start : start + length] for start in starts])


def _tensors(calib: Any, where: str, inputs: list[Value]) -> dict[str, Any]:
    if not isinstance(calib, str | Path):
        return dict(calib)
    from moec.runtime.arrays.tensor_files import read_tensors
    from moec.runtime.package import Port

    ports = tuple(Port(value.name, value.dtype, ()) for value in inputs)
    try:
        return read_tensors(Path(calib), ports)
    except InputError as error:
        raise SetupError(f"{where}: {error}") from None


def _input_tensor(
    value: Value, tensors: Mapping[str, Any], where: str, graph: Graph
) -> torch.Tensor:
    """One input, cast to the program's dtype. Floats and integers may have any width."""
    if value.name not in tensors:
        names = ", ".join(v for v in tensors) or "nothing"
        raise SetupError(f"{where} holds {names}, and the model takes {value.name}: {value.type}")
    tensor = tensors[value.name]
    if not isinstance(tensor, torch.Tensor):
        array = np.asarray(tensor)
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
        except TypeError:
            raise SetupError(f"{where}: {value.name} is no array of numbers") from None
    if tensor.is_floating_point() != (value.dtype in FLOATS):
        raise SetupError(f"{where}: {value.name} is {tensor.dtype}, the model takes {value.dtype}")
    if not tensor.numel():
        raise SetupError(f"{where}: {value.name} is empty")
    rows = table_rows(graph, value)
    if rows and (int(tensor.min()) < 0 or int(tensor.max()) >= rows):
        raise SetupError(
            f"{where}: {value.name} goes from {int(tensor.min())} to {int(tensor.max())}, and the "
            f"model takes ids from 0 to {rows - 1}"
        )
    return tensor.detach().to(TORCH_DTYPES[value.dtype])
