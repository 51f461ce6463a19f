"""Damage of folders of quantised checkpoints, each certain to be wrong: a reader has to refuse
every one."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.sources.checkpoint import writers
from tests.sources.checkpoint.families import model
from tests.sources.checkpoint.test_oracles import compressed, write_mxfp4
from tests.sources.checkpoint.test_values import FORMS

_SEEDS = "formats"
_FORMS = {
    "gptq": FORMS["gptq-asymmetric"],
    "gptq-act-order": FORMS["gptq-act-order"],
    "awq": FORMS["awq"],
    "fp8": FORMS["fp8-blocks"],
    "nf4": FORMS["nf4-nested"],
    "bnb-int8": FORMS["bnb-int8"],
}
_SCHEMES = ("int4-asymmetric", "w8a8")
NAMES = (*_FORMS, *_SCHEMES, "mxfp4")
_WEIGHTS = "model.safetensors"
_HUGE = (2**31, 2**48, 2**60, 2**63, 10**30)
_NO_SIZES = (0, -1, "64", 2**60, float("nan"), [64], {}, "", 1.5)


def write_seeds(folder: Path) -> None:
    """A small model in each format."""
    for name in NAMES:
        path = folder / _SEEDS / name
        if name == "mxfp4":
            write_mxfp4(path)
        else:
            form = _FORMS[name] if name in _FORMS else compressed(name)
            writers.write(model("mixtral", num_hidden_layers=1), path, *form)


@dataclass
class Draft:
    """A folder to damage: its configuration, and its tensors."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]  # type: ignore[no-any-return]

    def parts(self) -> list[str]:
        """The tensors that hold quantised weights."""
        return [name for name in self.tensors if name.endswith(_PARTS[self.name])]


_PARTS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales"),
    "gptq-act-order": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "fp8": ("weight_scale_inv",),
    "nf4": ("absmax", "quant_map", "__nf4"),
    "bnb-int8": ("SCB",),
    "int4-asymmetric": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "w8a8": ("weight_scale",),
    "mxfp4": ("_blocks", "_scales"),
}


@functools.cache
def _seed(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    return (path / "config.json").read_text(), load_file(path / _WEIGHTS)


def _draft(folder: Path, name: str) -> Draft:
    text, tensors = _seed(folder / _SEEDS / name / "quantised")
    return Draft(name, json.loads(text), {n: t.clone() for n, t in tensors.items()})


def _written(path: Path, config: Any, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / _WEIGHTS).write_bytes(content)
    (path / "config.json").write_text(json.dumps(config))
    return path


def _parted(draft: Draft) -> tuple[bytes, bytes]:
    """The header of a file of the tensors, and its data."""
    content = save(draft.tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


# Damage of tensors and configurations.

OfDraft = Callable[[Draft, random.Random], None]


def _lacks(draft: Draft, draw: random.Random) -> None:
    del draft.tensors[draw.choice(draft.parts())]


def _lacks_a_weight(draft: Draft, draw: random.Random) -> None:
    """A layer, or an expert, less."""
    names = [n for n in draft.tensors if "layers" in n or "norm" in n]
    stem = draw.choice(names).rpartition(".")[0]
    for name in [n for n in draft.tensors if n.startswith(stem)]:
        del draft.tensors[name]


def _shape(draft: Draft, draw: random.Random) -> None:
    name = draw.choice(draft.parts())
    tensor = draft.tensors[name]
    changes = [
        torch.cat((tensor, tensor[:1])),
        tensor[:0],
        tensor.flatten().repeat(2),
        tensor[None],
        torch.zeros((1 << 20, 0), dtype=tensor.dtype),
    ]
    if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1] and min(tensor.shape) > 1:
        changes.append(tensor.transpose(0, 1))
    draft.tensors[name] = draw.choice(changes)


def _shape_of_others(draft: Draft, draw: random.Random) -> None:
    name = draw.choice([n for n in draft.tensors if "norm" in n or "embed" in n])
    tensor = draft.tensors[name]
    draft.tensors[name] = draw.choice((torch.cat((tensor, tensor[:1])), tensor[1:], tensor[None]))


def _dtype(draft: Draft, draw: random.Random) -> None:
    """Floats for integers, integers for floats."""
    name = draw.choice(draft.parts())
    tensor = draft.tensors[name]
    if tensor.is_floating_point():
        others = torch.int32, torch.uint8, torch.int64, torch.bool
    else:
        others = torch.float32, torch.float16, torch.bfloat16, torch.bool
    draft.tensors[name] = tensor.to(draw.choice(others))


def _dtype_of_others(draft: Draft, draw: random.Random) -> None:
    name = draw.choice([n for n in draft.tensors if "norm" in n or "embed" in n])
    dtype = draw.choice((torch.int8, torch.uint8, torch.int32, torch.bool))
    draft.tensors[name] = draft.tensors[name].to(dtype)


def _group_index(draft: Draft, draw: random.Random) -> None:
    name = draw.choice([n for n in draft.parts() if n.endswith("g_idx")])
    index = draft.tensors[name]
    index[draw.randrange(len(index))] = draw.choice((-1, -(2**31), 3, 1000, 2**31 - 1))


def _unread(draft: Draft, draw: random.Random) -> None:
    names = ("x", "", "model.layers.9.mlp.gate.weight", "\x1b[2J", "a\nb", "model.norm.weight.x")
    draft.tensors[draw.choice(names)] = torch.ones(draw.choice(((), (3,), (2, 2), (0,))))


def _bits(draft: Draft, draw: random.Random) -> None:
    name = {"fp8": "weight_block_size"}.get(draft.name, draw.choice(("bits", "group_size")))
    values: dict[str, tuple[Any, ...]] = {
        "bits": (3, 0, -4, "4", None, [4], {}, float("nan"), 2**60, True, 4.0, 16),
        "group_size": (0, -2, 48, "32", float("nan"), [32], {}, *_HUGE, True, 32.0),
        "weight_block_size": (
            *([0, 3], [64], "64", float("nan"), [64, "64"], {}, [2**60, 2**60], [64, -64]),
            *([64, None], [[64], [64]], 64, [64, 64, 64], [1.0, 2.0]),
        ),
    }
    draft.quantization[name] = draw.choice(values[name])


def _method(draft: Draft, draw: random.Random) -> None:
    if draw.random() < 0.3:
        del draft.quantization["quant_method"]
    else:
        values = ("", "gptqq", None, 4, [], ["gptq"], {}, float("nan"), "x" * 5000, "aqlm", True)
        draft.quantization["quant_method"] = draw.choice(values)


def _quantization(draft: Draft, draw: random.Random) -> None:
    if draw.random() < 0.2:
        del draft.config["quantization_config"]
    else:
        draft.config["quantization_config"] = draw.choice(([4], "gptq", 4, 1.5, True, [], {}))


_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _size(draft: Draft, draw: random.Random) -> None:
    names = (*_COUNTS, "intermediate_size", "num_local_experts", "num_key_value_heads")
    draft.config[draw.choice(names)] = draw.choice(_NO_SIZES)


def _another_size(draft: Draft, draw: random.Random) -> None:
    """A configuration of another model."""
    sizes = ("hidden_size", "vocab_size", "intermediate_size", "num_local_experts")
    name = draw.choice((*sizes, "num_hidden_layers"))
    draft.config[name] += draw.choice((1, 32, 64, 900, 10**5, draft.config[name]))


def _number(draft: Draft, draw: random.Random) -> None:
    value = draw.choice((float("nan"), float("inf"), -float("inf"), "1e-5", [], {}, "x"))
    draft.config[draw.choice(("rms_norm_eps", "initializer_range", "attention_dropout"))] = value


def _rotary(draft: Draft, draw: random.Random) -> None:
    values = ({"rope_theta": float("nan"), "rope_type": "default"}, 5, "x", {"rope_type": "x"})
    draft.config["rope_parameters"] = draw.choice((*values, [1, 2]))


def _model_type(draft: Draft, draw: random.Random) -> None:
    values = (None, "", 4, [], {}, "mixtrall", "x" * 5000, "../x", True, "clip", "t5")
    draft.config["model_type"] = draw.choice(values)


def _dtype_of_model(draft: Draft, draw: random.Random) -> None:
    draft.config["dtype"] = draw.choice(("float33", 4, [], {}, "x", "torch.nn", "Tensor", True))


_OF_DRAFT: Mapping[str, OfDraft] = {
    "lacks a part": _lacks,
    "lacks a weight": _lacks_a_weight,
    "shape": _shape,
    "shape of others": _shape_of_others,
    "dtype": _dtype,
    "dtype of others": _dtype_of_others,
    "group index": _group_index,
    "unread": _unread,
    "bits": _bits,
    "method": _method,
    "quantization": _quantization,
    "size": _size,
    "another size": _another_size,
    "number": _number,
    "rotary": _rotary,
    "model type": _model_type,
    "dtype of the model": _dtype_of_model,
}
_ONLY: Mapping[str, tuple[str, ...]] = {
    "group index": ("gptq-act-order",),
    "bits": ("gptq", "awq", "fp8"),
    "method": tuple(name for name in NAMES if name not in ("nf4", "bnb-int8")),
}
"""The formats that a damage is of, where it is not of all. (bitsandbytes is recognised without a
quant_method, too.)"""


def _damaged(name: str) -> Callable[[Path, random.Random], Path]:
    def write(folder: Path, draw: random.Random) -> Path:
        draft = _draft(folder.parent, draw.choice(_ONLY.get(name, NAMES)))
        _OF_DRAFT[name](draft, draw)
        tensors = {n: tensor.contiguous() for n, tensor in draft.tensors.items()}
        return _written(folder, draft.config, save(tensors))

    return write


# Damage of the bytes of a file.


def _header(folder: Path, draw: random.Random) -> Path:
    """What the header says of one tensor is wrong."""
    draft = _draft(folder.parent, draw.choice(NAMES))
    text, data = _parted(draft)
    header = json.loads(text)
    entry = header[draw.choice([name for name in header if header[name]["shape"]])]
    start, end = entry["data_offsets"]
    huge = draw.choice(_HUGE)
    key, value = draw.choice(
        (
            ("data_offsets", [start, end + 1]),
            ("data_offsets", [end, start]),
            ("data_offsets", [start + huge, end + huge]),
            ("data_offsets", [-1, end]),
            ("data_offsets", [start + 8, end + 8]),
            ("data_offsets", [0, len(data) + 1]),
            ("data_offsets", [float(start), float(end)]),
            ("data_offsets", str(start)),
            ("data_offsets", []),
            ("data_offsets", None),
            ("shape", [huge, *entry["shape"]]),
            ("shape", [2**32, 2**32]),
            ("shape", [-size for size in entry["shape"]] if len(entry["shape"]) == 1 else [-1, -1]),
            ("shape", [str(size) for size in entry["shape"]]),
            ("shape", [[size] for size in entry["shape"]]),
            ("shape", entry["shape"][0]),
            ("shape", None),
            ("shape", [2] * 5000),
            ("dtype", "F4"),
            ("dtype", "U128"),
            ("dtype", []),
            ("dtype", None),
            ("dtype", "C64"),
        )
    )
    entry[key] = value
    return _written(folder, draft.config, _file(json.dumps(header).encode(), data))


def _length(folder: Path, draw: random.Random) -> Path:
    """The length of the header, or its text, is wrong."""
    draft = _draft(folder.parent, draw.choice(NAMES))
    text, data = _parted(draft)
    size = len(text)
    lengths = (0, 1, size - draw.randint(1, 60), size + 8, 2**31, 2**60, 2**63, 2**64 - 1)
    texts = (b"[" * 10000, b"[]", b"null", b"{}", text.replace(b"m", b"\xff", 1), b"{", text + b"x")
    if draw.random() < 0.5:
        content = _file(text, data, draw.choice(lengths))
    else:
        content = _file(draw.choice(texts), data)
    return _written(folder, draft.config, content)


def _truncated(folder: Path, draw: random.Random) -> Path:
    draft = _draft(folder.parent, draw.choice(NAMES))
    content = save(draft.tensors)
    size = int.from_bytes(content[:8], "little")
    # as often inside the header as inside the data
    stop = draw.choice((size, len(content)))
    return _written(folder, draft.config, content[: draw.randrange(stop)])


def _configuration(folder: Path, draw: random.Random) -> Path:
    """config.json is no configuration."""
    draft = _draft(folder.parent, draw.choice(NAMES))
    _written(folder, draft.config, save(draft.tensors))
    path = folder / "config.json"
    text = path.read_bytes()
    texts = (b"", b"[]", b"null", b"4", b'"x"', b"{}", b"\xff\xfe", b"[" * 20000, b'{"a":' * 20000)
    match draw.randrange(3):
        case 0:
            path.write_bytes(text[: draw.randrange(len(text) - 1)])
        case 1:
            path.unlink()
            if draw.random() < 0.5:
                path.mkdir()
        case _:
            path.write_bytes(draw.choice(texts))
    return folder


def _index(folder: Path, draw: random.Random) -> Path:
    """The files of an index are not those of the folder, or it is no index."""
    draft = _draft(folder.parent, draw.choice(NAMES))
    _written(folder, draft.config, b"").joinpath(_WEIGHTS).unlink()
    names = sorted(draft.tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        (folder / file).write_bytes(save({n: draft.tensors[n] for n in part}))
    weights: Any = {n: file for file, part in halves.items() for n in part}
    match draw.randrange(5):
        case 0:
            weights[draw.choice(names)] = draw.choice(
                ("c.safetensors", "../a.safetensors", "/etc/passwd", "", ".", "config.json", 4, [])
            )
        case 1:
            weights = draw.choice(([], "x", 4, None, {}, [["a", "b"]], {"x": None}))
        case 2:
            (folder / draw.choice([*halves])).unlink()
        case 3:
            file = draw.choice([*halves])
            weights = {n: f for n, f in weights.items() if f == file}
        case _:
            extra = {n: draft.tensors[n] for n in halves["b.safetensors"] + names[:1]}
            (folder / "b.safetensors").write_bytes(save(extra))
    text = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


WRITERS: Mapping[str, Callable[[Path, random.Random], Path]] = {
    "truncated": _truncated,
    "header": _header,
    "length": _length,
    "configuration": _configuration,
    "index": _index,
    **{name: _damaged(name) for name in _OF_DRAFT},
}
"""Each writes a case into a folder next to that of the seeds, and returns what is to be opened."""
