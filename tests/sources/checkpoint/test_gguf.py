"""GGUF files, written by the package gguf from a model's weights, in llama.cpp's layout."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.capture.doors import open_source
from moec.errors import CaptureError
from moec.files.gguf import read_header
from moec.ir.formats.integer import dequantise
from moec.sources.checkpoint.gguf.codes import STORED
from moec.sources.checkpoint.gguf.model import configuration
from tests.sources.checkpoint import gguf_writer
from tests.sources.checkpoint.families import COMMON, model
from tests.sources.checkpoint.gguf_writer import gguf

FAMILIES = ("mixtral", "qwen3_moe")
TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")


def encoded(weight, kind, seed):
    """The bytes of a weight; types that the package cannot write get random blocks."""
    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        generator = np.random.default_rng(seed)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = weight.shape[-1] // block
        data = generator.integers(0, 256, (*weight.shape[:-1], count, size), np.uint8)
        scale = np.frombuffer(np.float16(0.003).tobytes(), np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}[kind.name]:
            data[..., at : at + 2] = scale
        return data.reshape(*weight.shape[:-1], -1)


def write(path, family, kind, dequantised=False):
    """A file with matrices of a type, or with their values in float32."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
    raw = gguf.GGMLQuantizationType[kind]

    def encode(name, weight):
        if weight.ndim < 2 or "gate_inp" in name or "token_embd" in name:
            return weight, None
        data = encoded(weight, raw, len(name))
        if not dequantised:
            return data, raw
        return gguf.quants.dequantize(data, raw).reshape(weight.shape), None

    gguf_writer.write(path, model(family, **wide | {"head_dim": 64}), encode)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TYPES)
def test_values(kind, family, tmp_path):
    """The weights of a file, and its codes, have the values that the package gives."""
    for name, dequantised in (("model", False), ("values", True)):
        write(tmp_path / f"{name}.gguf", family, kind, dequantised)
    values = open_source(tmp_path / "values.gguf").model.state_dict()
    source = open_source(tmp_path / "model.gguf")
    read = source.model.state_dict()
    assert read.keys() == values.keys()
    # Scales of K types are rounded to float16 (test_gguf_codes.py), values to bfloat16.
    near = {"rtol": 2**-7, "atol": 2**-9} if kind.endswith("_K") else {"rtol": 0, "atol": 0}
    for name, tensor in values.items():
        size, expected = tensor.abs().max(), tensor.to(read[name].dtype).float()
        torch.testing.assert_close(read[name].float() / size, expected / size, **near)
    if kind not in STORED:
        return
    arranged = source.codes()
    maps = Path("/proc/self/smaps").read_text().split("model.gguf\n")[1:]
    assert all("Rss: 0 kB" in " ".join(part[:200].split()) for part in maps)  # it was given back
    assert not arranged.nearest
    for name, stored in arranged.stored.items():
        parts = stored.parts
        held = dequantise(stored.format.kind, parts.codes, parts.scales, parts.zeros)
        torch.testing.assert_close(held, values[name], **near)
    assert len(arranged.stored) == 2 * 6 + 1  # q, k, v, o, two of experts; the head


@pytest.mark.parametrize(("kind", "words"), [
    ("Q4_0", "weights keep the codes of the checkpoint, as int4:32:f16"),
    ("Q4_K", "weights keep the codes of the checkpoint, as int4:32:float_zeros:f16"),
    ("Q6_K", "weights keep the codes of the checkpoint, as int6:16:f16"),
    ("IQ4_NL", "weights are rounded to int8:32: kernels read no IQ4_NL"),
])  # fmt: skip
def test_compiled(kind, words, tmp_path):
    write(tmp_path / "model.gguf", "mixtral", kind)
    compiled = moec.compile(str(tmp_path / "model.gguf"), build=False)
    assert words in " ".join(str(compiled.report()).split())


def test_the_configuration(tmp_path):
    write(tmp_path / "model.gguf", "mixtral", "F16")
    config = open_source(tmp_path / "model.gguf").model.config
    assert config.model_type == "mixtral"
    assert config.vocab_size == COMMON["vocab_size"]
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)


def test_cut_anywhere(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "qwen3_moe", "Q8_0")
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 37), len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(CaptureError) as caught:
            open_source(cut)
        assert "\n" not in str(caught.value)


def header(*fields, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields)


def field(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def entry(name, offset):
    """A tensor of eight float32 numbers."""
    sizes = struct.pack("<IQIQ", 1, 8, 0, offset)
    return struct.pack("<Q", len(name)) + name + sizes


def aligned(*fields: bytes) -> bytes:
    return header(*fields) + bytes(-len(header(*fields)) % 32)


PADDING = b"\0" * 4096
DAMAGED = [
    (b"GGUX" + PADDING, "does not start with GGUF"),
    (b"GGUF" + struct.pack("<I", 9) + PADDING, "its version is 9"),
    (header(tensors=2**60) + PADDING, "tensors and 0 fields pass its end"),
    (header(field(b"a", 8, struct.pack("<Q", 2**60))) + PADDING, "passes its end"),
    (header(field(b"a", 9, struct.pack("<IQ", 0, 2**60))) + PADDING, "passes its end"),
    (header(field(b"a", 9, struct.pack("<IQ", 9, 1))) + PADDING, "elements of type 9"),
    (header(field(b"a", 77, b"")) + PADDING, "has the type 77"),
    (header(field(b"\xff\xfe", 0, b"\1")) + PADDING, "no UTF-8"),
    (header(field(b"a", 0, b"\1"), field(b"a", 0, b"\1")) + PADDING, "the field a twice"),
    (header(field(b"general.alignment", 4, struct.pack("<I", 0))) + PADDING, "alignment is 0"),
    (aligned(field(b"split.count", 2, struct.pack("<H", 3))), "part of a model in 3"),
    (aligned(field(b"a", 0, b"\1")) + PADDING, r"more after its last tensor .bytes: 4,096."),
    (aligned(field(b"a", 0, b"\1")) + b"\0", r"more after its last tensor .bytes: 1."),
    (aligned(field(b"split.count", 8, struct.pack("<Q", 1) + b"x")), "one of 'x' files"),
    (header(tensors=2) + entry(b"a", 0) + entry(b"b", 0) + PADDING, "b does not begin where the"),
    (header(tensors=1) + entry(b"a\nb", 0) + PADDING, "which is no name"),
    (aligned(), "general.architecture is None"),
    (b"", "cannot be read|truncated or damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), DAMAGED)
def test_damaged(content, words, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=words) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("block_count", 10**9, "block_count is 1,000,000,000, and the file holds 2 blocks"),
    ("block_count", 2**31, "block_count is 2147483648, and has to be a whole number from 1"),
    ("expert_used_count", 0, "expert_used_count is 0, and has to be a whole number from 1"),
    ("expert_used_count", 5, "expert_used_count has to be 1 to 4"),
    ("rope.freq_base", float("nan"), "rope.freq_base is nan, and has to be a positive number"),
    ("attention.layer_norm_rms_epsilon", "x", "is 'x', and has to be a positive number"),
])  # fmt: skip
def test_fields_that_are_no_numbers_of_the_model(name, value, words, tmp_path):
    write(tmp_path / "model.gguf", "mixtral", "F16")
    file = read_header(tmp_path / "model.gguf")
    fields = {**file.fields, f"llama.{name}": value}
    with pytest.raises(CaptureError, match=words):
        configuration(replace(file, fields=fields))


def test_a_split_list_that_names_itself(tmp_path):
    """Each part says that it is the first of two: no part is read twice."""
    fields = [field(b"split.count", 2, struct.pack("<H", 2)), field(b"split.no", 2, b"\0\0")]
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(aligned(*fields))
    with pytest.raises(CaptureError, match="is not part 2 of 2, as its name says"):
        open_source(tmp_path / "m-00001-of-00002.gguf")
