"""Writes a checkpoint of transformers with weights in few bits, in the form of compressed-tensors.

    weight_packed i32[N, K * bits / 32]   weight_scale bf16[N, G]   weight_shape i64[2]

Names are those of the source, with experts one by one. Tensors are read, rounded and written one
after another, so that memory holds one tensor of the source.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moec.capture import Captured
from moec.capture.auto_class import auto_class
from moec.capture.hub import hub_off, own_config
from moec.errors import CaptureError, UsageError
from moec.files.checkpoint import CONFIG, TOKENIZER_FILES
from moec.files.config_fields import check_folder
from moec.files.regular_file import read_regular
from moec.files.safetensors_shards import LARGEST, NewTensor, TensorGroup, write_shards
from moec.files.whole_folder import check_room, whole_folder
from moec.ir.formats.integer import quantise
from moec.ir.formats.notation import Format, Quantisation, parse_parts
from moec.passes.core.runner import PassResult
from moec.report.data import QuantisedLine
from moec.sources.checkpoint.conversion import Conversion, conversion_of
from moec.sources.checkpoint.folders.packed_integers import pack_last
from moec.sources.checkpoint.load import check_config, check_experts, empty_model
from moec.sources.checkpoint.table import format_of, quantization_of
from moec.sources.checkpoint.tensors import DTYPES, map_folder
from moec.sources.checkpoint.weight import CheckpointWeight

COPIED = (
    *TOKENIZER_FILES,
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
"""Files next to the weights that are copied where they exist."""
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_ROUTER = re.compile(r"(^|[._])(gate|router)(\.|$)")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What was written: the number of matrices in each format, by part, and of those that stay."""

    path: str
    bytes: int
    files: int
    formats: Mapping[str, int]
    unchanged: int


@dataclass(frozen=True)
class _Matrix:
    """A weight of the new checkpoint: `format` None for one that stays."""

    name: str
    shape: tuple[int, ...]
    format: Format | None


def parse_conversion(text: str) -> Quantisation:
    """The formats of --quant: one without a name is that of experts and linear layers.

    Raises UsageError for a format that transformers does not read.
    """
    quant = parse_parts(text)
    if "=" not in text:
        quant = Quantisation(quant.experts, quant.experts)
    formats = [format for format in (quant.experts, quant.linears) if format is not None]
    if not formats or quant.head is not None:
        raise UsageError(
            f"--quant {text}: give a format for experts and linear layers, such as int4:64 or "
            "experts=int4:64,linears=int8; the head stays as it is"
        )
    for format in formats:
        if format.kind not in ("int4", "int8") or format.asymmetric or format.row_bits != 8:
            raise UsageError(
                f"--quant {text}: transformers reads experts of int4 or int8, in blocks or not, "
                f"and symmetric: write int4:64 or int8 instead of {format}"
            )
    return quant


def convert(
    folder: Path,
    output: Path,
    quant: Quantisation,
    largest: int = LARGEST,
    progress: Callable[[str], None] = lambda phase: None,
) -> ConvertedCheckpoint:
    """Writes the checkpoint in `folder` to `output`, in shards of at most `largest` bytes; a
    folder that exists there is replaced.

    Raises CaptureError for a checkpoint that cannot be read or has experts in a stack that
    transformers cannot divide, UsageError where blocks do not divide a row or the disk is full.
    """
    progress("read")
    check_folder(folder, COPIED)
    source = open_checkpoint(folder)
    groups: list[TensorGroup] = []
    matrices: list[_Matrix] = []
    for name, weight in source.weights.items():
        group, parts = _group(source, quant, name, weight)
        groups.append(group)
        matrices += parts
    config = {k: v for k, v in source.fields.items() if k != "compression_config"}
    config["quantization_config"] = _quantization(source, quant, matrices)
    copied = [folder / name for name in COPIED if (folder / name).is_file()]
    size = sum(group.nbytes for group in groups) + sum(path.stat().st_size for path in copied)
    check_room(output, size)
    progress("write")
    with whole_folder(output) as new:
        files = write_shards(new, groups, largest, progress)
        for path in copied:
            shutil.copyfile(path, new / path.name)
        (new / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    formats = Counter(f"{_part_of(m.name)} {m.format}" for m in matrices if m.format is not None)
    unchanged = len(matrices) - formats.total()
    return ConvertedCheckpoint(str(output), size, len(files), dict(formats), unchanged)


def _group(
    source: SourceCheckpoint, quant: Quantisation, name: str, weight: CheckpointWeight
) -> tuple[TensorGroup, list[_Matrix]]:
    """What is written of a weight, and the matrices in it."""
    dtype = weight.dtype or getattr(source.config, "dtype", None) or torch.bfloat16
    divide = partial(_divided, source, quant, name)
    shapes = divide(torch.empty(weight.shape, dtype=dtype, device="meta"))
    matrices = [
        _Matrix(part, tuple(tensor.shape), _format(source, quant, part, tensor))
        for part, tensor in shapes.items()
    ]

    def read() -> Sequence[Any]:
        tensors = divide(weight.values())
        stored = (_stored(matrix, tensors[matrix.name], dtype) for matrix in matrices)
        return [_bytes(tensor) for parts in stored for tensor in parts]

    headers = [header for matrix in matrices for header in _headers(matrix, dtype)]
    return TensorGroup(tuple(headers), read), [m for m in matrices if len(m.shape) > 1]


def _divided(
    source: SourceCheckpoint, quant: Quantisation, name: str, tensor: Tensor
) -> dict[str, Tensor]:
    """The tensor by its name; a stack of experts that is to be quantised, as one matrix an expert.

    Raises CaptureError where transformers has no names for these.
    """
    conversion = source.conversion
    target, _ = conversion.target(name)
    if tensor.ndim != 3 or quant.experts is None or not _is_stack(conversion, target):
        return {name: tensor}
    from transformers.core_model_loading import revert_weight_conversion

    parts: dict[str, Tensor] = revert_weight_conversion(conversion.model, {target: tensor})
    for part, matrix in parts.items():
        if matrix.ndim != 2 or conversion.target(part)[0] != target or not _EXPERT.search(part):
            raise CaptureError(
                f"{name} is a stack of {len(tensor)} experts, for which transformers' "
                f"{type(conversion.model).__name__} has no names one by one, and compressed-tensors"
                " has no stacks: quantise linear layers only, with --quant linears=int8"
            )
    return parts


def _is_stack(conversion: Conversion, target: str) -> bool:
    if target not in conversion.state:
        return False
    module = conversion.model.get_submodule(target.rpartition(".")[0])
    return not isinstance(module, nn.Conv1d)


def _format(
    source: SourceCheckpoint, quant: Quantisation, name: str, tensor: Tensor
) -> Format | None:
    """The format of a tensor; None where it stays as it is.

    Raises UsageError where its blocks do not divide a row.
    """
    if not name.endswith(".weight") or tensor.ndim != 2 or not tensor.dtype.is_floating_point:
        return None
    part = _part_of(name)
    if not _is_read_alone(source.conversion, name, part):
        return None
    format: Format | None = getattr(quant, part)
    width = tensor.shape[-1]
    if format is not None and format.block and width % format.block:
        raise UsageError(
            f"{name} has rows of {width} weights, which blocks of {format.block} do not divide: "
            f"choose smaller blocks or none for {part}, as in --quant {part}={format.kind}"
        )
    return format


def _part_of(name: str) -> str:
    return "experts" if _EXPERT.search(name) else "linears"


def _is_read_alone(conversion: Conversion, name: str, part: str) -> bool:
    """Whether the model has a weight of an expert, or of a linear layer, with this name."""
    target, pattern = conversion.target(name)
    if target not in conversion.state:
        return False  # such as a layer that predicts further tokens
    if part == "experts":
        return True
    module_name = target.removesuffix(".weight")
    model = conversion.model
    module = model.get_submodule(module_name) if target != module_name else None
    return (
        pattern is None
        and isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not _ROUTER.search(module_name)
    )


def _headers(matrix: _Matrix, dtype: torch.dtype) -> list[NewTensor]:
    if matrix.format is None:
        return [NewTensor(matrix.name, _DTYPE_NAMES[dtype], matrix.shape)]
    n, k = matrix.shape
    words = -(-k * matrix.format.bits // 32)
    return [
        NewTensor(f"{matrix.name}_packed", "I32", (n, words)),
        NewTensor(f"{matrix.name}_scale", "BF16", (n, matrix.format.blocks(k))),
        NewTensor(f"{matrix.name}_shape", "I64", (2,)),
    ]


def _stored(matrix: _Matrix, tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    if matrix.format is None:
        return [tensor.to(dtype)]
    parts = quantise(matrix.format, tensor[None])
    packed = pack_last(parts.codes[0], matrix.format.bits)
    return [packed, parts.scales[0], torch.tensor(matrix.shape)]


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _quantization(
    source: SourceCheckpoint, quant: Quantisation, matrices: Sequence[_Matrix]
) -> dict[str, Any]:
    """The quantization_config. Readers ask it for the format of a module by its name."""
    by_format: dict[Format, list[str]] = {}
    ignored = {"lm_head"}
    for matrix in matrices:
        module = matrix.name.removesuffix(".weight")
        if matrix.format is not None:
            by_format.setdefault(matrix.format, []).append(module)
        elif module != matrix.name:
            # readers use the names of checkpoints or of models
            ignored |= {module, source.conversion.target(matrix.name)[0].removesuffix(".weight")}
    groups = {}
    for i, (format, modules) in enumerate(by_format.items()):
        targets = ["Linear"] if len(by_format) == 1 else modules
        if len(by_format) > 1 and format == quant.experts:
            # transformers recognises the group of experts by a pattern
            targets = [r"re:.*\.experts\.\d+\..*"]
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": {
                "num_bits": format.bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                "strategy": "group" if format.block else "channel",
                "group_size": format.block or None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True)
class SourceCheckpoint:
    """The weights of a folder, and the conversion of a model without values that determines what
    they are; `fields` are those of config.json, `config` is the model's."""

    fields: Mapping[str, Any]
    weights: Mapping[str, CheckpointWeight]
    conversion: Conversion

    @property
    def config(self) -> Any:
        return self.conversion.model.config


def open_checkpoint(folder: Path) -> SourceCheckpoint:
    """Maps the folder's files. Raises CaptureError where they are of no model, or lack experts."""
    fields = json.loads(read_regular(folder / CONFIG))
    check_config(folder / CONFIG, fields)
    tensors = map_folder(folder)
    weights = format_of(fields, tuple(tensors)).read(quantization_of(fields) or {}, tensors)
    check_experts(weights)
    with hub_off():
        empty = empty_model(auto_class(folder, fields, ()).auto, own_config(folder))
    return SourceCheckpoint(fields, weights, conversion_of(empty))


@dataclass(frozen=True)
class Transformed:
    """A model after its passes: the last of `pass_results` has the graph to export. `quantised` has
    a line for each module whose weights became codes; `name` is for messages."""

    name: str
    captured: Captured
    pass_results: tuple[PassResult, ...]
    quantised: tuple[QuantisedLine, ...]
