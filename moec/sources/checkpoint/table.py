"""The formats of checkpoints: how each is recognised, and what reads it. `moec list formats` prints
this table, and `format_of` dispatches by it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moec.errors import CaptureError
from moec.files.gguf import BLOCKS
from moec.sources.checkpoint.folders import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from moec.sources.checkpoint.gguf import arrange as gguf_weights
from moec.sources.checkpoint.gguf.architectures import NAMES
from moec.sources.checkpoint.gguf.codes import STORED, StoredType
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import CheckpointWeight, plain
from moec.spelling import did_you_mean

Reader = Callable[[Mapping[str, Any], Any], dict[str, CheckpointWeight]]


@dataclass(frozen=True)
class CheckpointFormat:
    """A format of the weights of a folder or file. `methods` are the values of `quant_method` in
    config.json by which a folder is recognised, `magic` is the start of a file; `holds` and
    `stored_as` are for people."""

    name: str
    methods: tuple[str, ...]
    holds: str
    stored_as: str
    read: Reader
    magic: str = ""

    @property
    def recognised_by(self) -> str:
        if self.magic:
            return f"a file that starts with {self.magic}"
        return " or ".join(map("quant_method {}".format, self.methods)) or "no quantization_config"


def _plain(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    return {name: plain(tensors, name) for name in tensors}


FOLDERS = (
    CheckpointFormat(
        "safetensors",
        (),
        "float32, bfloat16, float16",
        "as they are",
        _plain,
    ),
    CheckpointFormat(
        "gptq",
        ("gptq",),
        "integers of 2, 4, 8 bits, one scale a group or row, with or without zeros; act-order",
        "int4, int8; act-order: int8, rounded",
        gptq.read,
    ),
    CheckpointFormat(
        "awq",
        ("awq",),
        "integers of 4 bits in groups (gemm)",
        "int4",
        awq.read,
    ),
    CheckpointFormat(
        "compressed-tensors",
        ("compressed-tensors",),
        "integers of 2, 4, 8 bits, packed or not; e4m3",
        "int4, int8, fp8; act-order: int8, rounded",
        compressed_tensors.read,
    ),
    CheckpointFormat(
        "fp8",
        ("fp8", "fbgemm_fp8"),
        "e4m3, e5m2 with one scale a tensor, row, or block of 128 x 128",
        "fp8; e5m2: int8, rounded",
        fp8.read,
    ),
    CheckpointFormat(
        "mxfp4",
        ("mxfp4",),
        "e2m1 in blocks of 32 (gpt-oss)",
        "mxfp4",
        mxfp4.read,
    ),
    CheckpointFormat(
        "bitsandbytes",
        ("bitsandbytes",),
        "nf4, fp4 in blocks, with scales of 8 bits or not; int8 with one scale a row",
        "int8; nf4, fp4: int8, rounded",
        bitsandbytes.read,
    ),
)


def _kinds(stored: Mapping[str, StoredType]) -> str:
    """Types of GGUF by the kind of their codes."""
    kinds = groupby(stored, lambda type: stored[type].format.kind)
    return "; ".join(f"{', '.join(types)}: {kind}" for kind, types in kinds)


GGUF = CheckpointFormat(
    "gguf",
    (),
    f"{', '.join(BLOCKS)}; of {', '.join(NAMES)} (llama with experts is mixtral)",
    f"{_kinds(STORED)}; others: int8, rounded",
    gguf_weights.read,
    "GGUF",
)
FORMATS = (*FOLDERS, GGUF)


def format_of(config: Mapping[str, Any], names: Collection[str]) -> CheckpointFormat:
    """The format of a folder with this config.json and tensors of these names.

    Raises CaptureError where the quantization is of no known method, or is named in config.json
    and absent from the tensors, or the reverse.
    """
    method = method_of(config)
    if method is None:
        for name in names:
            if name.endswith(
                (".qweight", ".weight_packed", ".weight_scale_inv", ".SCB", ".absmax")
            ):
                raise CaptureError(
                    f"the tensor {name} is quantised, and config.json has no quantization_config "
                    "that says how: copy config.json again from the source of the checkpoint"
                )
        return FOLDERS[0]
    for format in FOLDERS:
        if method in format.methods:
            return format
    methods = [each for format in FOLDERS for each in format.methods]
    raise CaptureError(
        f"config.json: weights of quant_method {method[:40]!r} are not supported"
        f"{did_you_mean(method, methods)}; moec reads {', '.join(methods)}"
    )


def method_of(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a configuration; None where weights are not quantised."""
    quantization = quantization_of(config)
    if quantization is None:
        return None
    method = quantization.get("quant_method", "")
    if not method and any(quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8)):
        return "bitsandbytes"  # whose older versions did not write their name
    return str(method).lower().replace("_", "-").replace("fbgemm-fp8", "fbgemm_fp8")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a configuration, under its present or its former name.

    Raises CaptureError where it is no object.
    """
    for name in ("quantization_config", "compression_config"):
        value = config.get(name)
        if value is not None:
            if not isinstance(value, Mapping):
                raise CaptureError(f"config.json: {name} is a {type(value).__name__}, no object")
            return value
    return None
