"""Writes a checkpoint as a GGUF file for llama.cpp: the inverse of checkpoint/gguf.

Names of tensors are those of the package gguf. What the file says of its model is read again before
anything is written: a configuration that would not come back is refused. Tensors are read and
written one after another, a stack of experts at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.export.checkpoint import SourceCheckpoint, open_checkpoint
from moec.export.gguf_tokenizer import tokenizer_fields
from moec.files.checkpoint import CONFIG, TOKENIZER_FILES
from moec.files.gguf import BLOCKS, GgufHeader, GgufTensor
from moec.files.regular_file import read_regular, whole_file
from moec.files.whole_folder import check_room
from moec.sources.checkpoint.conversion import Group
from moec.sources.checkpoint.gguf.architectures import ARCHITECTURES, INTEGERS, REALS
from moec.sources.checkpoint.gguf.model import configuration, model_name

WRITTEN = {
    ARCHITECTURES[name].model_type: name
    for name in ("llama", "llama with experts", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe")
}
"""The architectures that are written, by transformers' type of the model."""
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_WITH_HEAD = ("olmoe", "qwen2moe")
"""Architectures for which llama.cpp does not take the embedding as the head."""
_OUTER = ("token_embd.weight", "output.weight")
_UNSAID = {
    *("architectures", "dtype", "transformers_version", "quantization_config", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    *("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "pretraining_tp"),
    *("_name_or_path", "max_window_layers", "compression_config"),
}
"""Fields of a configuration that do not change what a model computes with given tokens."""
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class ExportedGguf:
    """What was written: the number of tensors of each type; `tokens` 0 without a tokenizer."""

    path: str
    bytes: int
    architecture: str
    types: Mapping[str, int]
    tokens: int


@dataclass(frozen=True)
class _NewTensor:
    """A tensor to write, with the rows last; `read` gives its values."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: Read

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        _, block, size = BLOCKS[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * size)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape, dtype=np.int64))


def export_gguf(
    folder: Path,
    output: Path,
    type: str = "bf16",
    progress: Callable[[str], None] = lambda phase: None,
) -> ExportedGguf:
    """Writes the checkpoint in `folder` as one file, with its matrices in `type`; routers, norms
    and biases are float32, and embeddings and the head have 8 bits with q4_0.

    Raises CaptureError for an architecture, a field of the configuration, a tensor or a tokenizer
    that llama.cpp's format does not hold.
    """
    import gguf  # not a part of every installation

    progress("read")
    source = open_checkpoint(folder)
    settings = source.config
    if settings.model_type not in WRITTEN:
        raise CaptureError(
            f"{folder / CONFIG}: GGUF files are written of {', '.join(WRITTEN)}, not of "
            f"{settings.model_type!r}"
        )
    architecture = WRITTEN[settings.model_type].partition(" ")[0]
    tensors = _tensors(source, architecture, type)
    fields = _model_fields(settings, architecture)
    _check_configuration(settings, fields, tensors)
    files = {n: read_regular(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()}
    ends = settings.eos_token_id
    ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    fields |= tokenizer_fields(files, architecture, settings.vocab_size, ends)
    size = sum(tensor.nbytes for tensor in tensors)
    check_room(output, size)
    fields |= {
        "general.name": folder.resolve().name,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": int(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"]),
    }
    progress("write")
    with whole_file(output) as file:
        _write(Path(file.name), architecture, fields, tensors, progress)
    types = dict(Counter(tensor.type for tensor in tensors))
    tokens = len(fields.get("tokenizer.ggml.tokens", ()))
    return ExportedGguf(str(output), output.stat().st_size, architecture, types, tokens)


def _tensors(source: SourceCheckpoint, architecture: str, type: str) -> list[_NewTensor]:
    """The tensors to write. Raises CaptureError where the checkpoint lacks one."""
    import gguf

    conversion, settings = source.conversion, source.config
    variant = ARCHITECTURES[WRITTEN[settings.model_type]]
    groups = conversion.groups(source.weights)
    if settings.tie_word_embeddings and architecture in _WITH_HEAD:
        raise CaptureError(
            f"config.json: tie_word_embeddings is set, and llama.cpp reads {architecture} only "
            "with a head: save the model with the embedding as lm_head.weight, and without it"
        )
    heads = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], settings.num_hidden_layers)
    tensors: list[_NewTensor] = []
    for target, expected in conversion.state.items():
        if target in heads:
            continue  # llama.cpp takes the embedding
        if target not in groups:
            raise CaptureError(f"the checkpoint lacks the weight {target}")
        read = partial(_values, source, target, groups[target])
        for part, shape, values in _parts(target, expected.shape, read, settings, architecture):
            name = names.get_name(part, try_suffixes=(".weight", ".bias")) or part
            name = f"{name}.weight" if name.endswith("_exps") else name
            if "_exps" not in name and model_name(variant, name) != part:
                raise CaptureError(f"{target} has no name in GGUF files of {architecture}")
            tensors.append(_NewTensor(name, _type(name, shape, type), shape, values))
    if unread := sorted(groups.keys() - conversion.state.keys()):
        raise CaptureError(f"the checkpoint holds {unread[0]}, which no weight of the model reads")
    return tensors


def _values(source: SourceCheckpoint, target: str, group: Group) -> Tensor:
    tensors = [source.weights[name].values() for _, name in group]
    values = source.conversion.convert(target, group, tensors)[target]
    expected = source.conversion.state[target].shape
    if values.shape != expected:
        raise CaptureError(
            f"the weight {target} is {list(values.shape)}, and config.json makes it "
            f"{list(expected)}: they are of different models"
        )
    return values


def _parts(
    target: str, shape: tuple[int, ...], read: Read, config: Any, architecture: str
) -> list[tuple[str, tuple[int, ...], Read]]:
    """What a weight of the model, which `read` gives, is in a file: names of transformers, shapes
    and values."""
    if target.endswith("experts.gate_up_proj"):
        e, both, d = shape
        stem = target.removesuffix("gate_up_proj")
        return [
            (f"{stem}{part}_proj", (e, both // 2, d), partial(_half, read, i))
            for i, part in enumerate(("gate", "up"))
        ]
    if architecture == "llama" and target.endswith(("q_proj.bias", "k_proj.bias")):
        raise CaptureError(f"{target}: biases of q and k are not written for llama")
    if architecture == "llama" and target.endswith(("q_proj.weight", "k_proj.weight")):
        of_queries = target.endswith("q_proj.weight")
        heads = config.num_attention_heads if of_queries else config.num_key_value_heads
        return [(target, tuple(shape), partial(_paired, read, heads))]
    if target.endswith("shared_expert_gate.weight"):
        return [(target, tuple(shape[1:]), lambda: read()[0])]
    return [(target, tuple(shape), read)]


def _half(read: Read, part: int) -> Tensor:
    return read().chunk(2, 1)[part]


def _paired(read: Read, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: the halves of a head, in turn."""
    weight = read()
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _type(name: str, shape: tuple[int, ...], type: str) -> str:
    if len(shape) == 1 or name.endswith(_FLOAT32):
        return "F32"
    if type == "q4_0" and name in _OUTER:
        type = "q8_0"
    return type.upper() if shape[-1] % BLOCKS[type.upper()][1] == 0 else "BF16"


def _model_fields(config: Any, architecture: str) -> dict[str, Any]:
    """The fields of a configuration, as far as there are any: see `_check_configuration`."""
    variant = ARCHITECTURES[WRITTEN[config.model_type]]
    names = INTEGERS | REALS | dict(variant.integers)
    values = {field: getattr(config, key, None) for field, key in names.items()}
    values["attention.value_length"] = values["attention.key_length"]
    values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    values["vocab_size"] = config.vocab_size
    named = {f"{architecture}.{name}": v for name, v in values.items() if v is not None}
    return {"general.architecture": architecture, **named}


def _check_configuration(config: Any, fields: Mapping[str, Any], tensors: list[_NewTensor]) -> None:
    """Raises CaptureError where a file with these fields is one of another configuration."""
    from transformers import AutoConfig

    nowhere = Path()
    stored = {t.name: GgufTensor(nowhere, t.type, t.shape, 0, t.nbytes) for t in tensors}
    read = AutoConfig.for_model(**configuration(GgufHeader(fields, stored))).to_dict()
    for key, value in config.to_dict().items():
        if key not in _UNSAID and read.get(key) != value:
            raise CaptureError(
                f"config.json: {key} is {value!r}, and llama.cpp would compute with "
                f"{read.get(key)!r}: GGUF files of {fields['general.architecture']} do not say it"
            )


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: list[_NewTensor],
    progress: Callable[[str], None],
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for name, value in fields.items():
        if name == "general.architecture":
            continue  # the writer adds it
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            adders.get(type(value), writer.add_string)(name, value)
    bytes_type = np.dtype(np.uint8)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.stored_shape, bytes_type, tensor.nbytes, kind)
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, tensor in enumerate(tensors):
            progress(f"write {i + 1}/{len(tensors)} tensors")
            writer.write_tensor_data(_encoded(tensor))


def _encoded(tensor: _NewTensor) -> Any:
    """The bytes u8 of a tensor."""
    from gguf import GGMLQuantizationType, quants

    values = tensor.read()
    plain = {"F32": torch.float32, "BF16": torch.bfloat16}.get(tensor.type)
    if plain is not None:
        flat = values.to(plain).contiguous().flatten()
        return flat.view(torch.uint8).numpy().reshape(tensor.stored_shape)
    data = np.empty(tensor.stored_shape, np.uint8)
    matrices = values.view(-1, *values.shape[-2:]) if values.ndim == 3 else values[None]
    for stored, matrix in zip(data.reshape(len(matrices), *data.shape[-2:]), matrices, strict=True):
        kind = GGMLQuantizationType[tensor.type]
        stored[:] = quants.quantize(matrix.float().contiguous().numpy(), kind)
    return data
