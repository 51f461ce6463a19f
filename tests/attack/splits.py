"""Models in several files, GGUF splits and safetensors with an index, of which one is damaged,
another one, or no file at all: each is refused."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.attack import gguf_files
from tests.attack.fields import import_all
from tests.attack.refusal import case as refused
from tests.sources.checkpoint.families import model

_INDEX = "model.safetensors.index.json"
_SEED = "whole"
_COUNTS = (0, -1, 1, 5, 100_000, 2**31, "2", None, True, 2.5)


def write_seeds(folder: Path) -> None:
    model("mixtral", num_hidden_layers=1).save_pretrained(folder / _SEED)


@functools.cache
def _model_parts(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    return (path / "config.json").read_text(), load_file(path / "model.safetensors")


def _damaged(path: Path, others: list[Path], draw: random.Random) -> None:
    """A file of a model becomes something that is no whole file of it."""
    content = path.read_bytes()
    path.unlink()
    kind = draw.randrange(9)
    match kind:
        case 0:
            pass
        case 1:
            os.mkfifo(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(path)
        case 4:
            (path.parent.parent / "outside").write_bytes(content)
            path.symlink_to("../outside")
        case 5:
            path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "nothing", "/etc/passwd")))
        case 6:
            path.write_bytes(content[: draw.randrange(len(content) - 64)])
        case 7:
            path.write_bytes(draw.choice(others).read_bytes())
        case _:
            path.write_bytes(draw.choice((b"", b"GGUF", bytes(4096), b"\xff" * 64, b"{}")))


def _shards(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    config, tensors = _model_parts(folder.parent / _SEED)
    (folder / "config.json").write_text(config)
    names = sorted(tensors)
    parts = {f"{i}.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    return parts, {name: file for file, part in parts.items() for name in part}


def _write(folder: Path, parts: Mapping[str, dict[str, torch.Tensor]], weights: Any) -> None:
    for file, part in parts.items():
        (folder / file).write_bytes(save(part))
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def _shard(folder: Path, draw: random.Random) -> Path:
    parts, weights = _shards(folder)
    _write(folder, parts, weights)
    file = draw.choice([*parts])
    _damaged(folder / file, [folder / other for other in parts if other != file], draw)
    return folder


def _bytes_after_a_shard(folder: Path, draw: random.Random) -> Path:
    parts, weights = _shards(folder)
    _write(folder, parts, weights)
    with (folder / draw.choice([*parts])).open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, 4096))))
    return folder


def _index(folder: Path, draw: random.Random) -> Path:
    parts, weights = _shards(folder)
    changed: Any = dict(weights)
    name, file = draw.choice([*weights]), draw.choice([*parts])
    match draw.randrange(5):
        case 0:
            odd = (
                "../0.safetensors",
                "/etc/passwd",
                "",
                ".",
                "config.json",
                "9.safetensors",
                "x/y",
            )
            changed[name] = draw.choice((*odd, 4, None, [], {}, True, "0.safetensors\0"))
        case 1:
            changed = draw.choice(([], "x", 4, None, {}, True, [["a", "b"]], {"x": None}))
        case 2:
            changed = {n: f for n, f in weights.items() if f != file}
        case 3:
            parts[file] = parts[file] | {name: parts[weights[name]][name]}
            if weights[name] == file:
                other = next(f for f in parts if f != file)
                parts[other] = parts[other] | {name: parts[file][name]}
        case _:
            del parts[weights[name]][name]
    _write(folder, parts, changed)
    if draw.random() < 0.1:
        (folder / _INDEX).write_bytes(draw.choice((b"", b"[]", b"{", b"[" * 10000, b"\xff")))
    return folder


def _odd_index(folder: Path, draw: random.Random) -> Path:
    parts, weights = _shards(folder)
    _write(folder, parts, weights)
    _damaged(folder / _INDEX, [folder / file for file in parts], draw)
    return folder


def _split(folder: Path) -> tuple[list[gguf_files.Draft], list[Path]]:
    drafts = [gguf_files.draft() for _ in range(3)]
    paths = [folder / f"m-{i + 1:05}-of-00003.gguf" for i in range(3)]
    for i, draft in enumerate(drafts):
        draft.tensors = draft.tensors[i::3]
        if i:
            draft.fields = []
        draft.replace("split.count", *gguf_files.number(3))
        draft.replace("split.no", *gguf_files.number(i))
    return drafts, paths


def _written(drafts: list[gguf_files.Draft], paths: list[Path]) -> Path:
    for draft, path in zip(drafts, paths, strict=True):
        path.write_bytes(draft.encode())
    return paths[0]


def _gguf_file(folder: Path, draw: random.Random) -> Path:
    drafts, paths = _split(folder)
    _written(drafts, paths)
    at = draw.randrange(1, 3)
    _damaged(paths[at], [path for path in paths if path != paths[at]], draw)
    return paths[0]


def _gguf_number(folder: Path, draw: random.Random) -> Path:
    drafts, paths = _split(folder)
    draft = draw.choice(drafts)
    name, right = draw.choice((("split.count", 3), ("split.no", drafts.index(draft))))
    value = draw.choice([n for n in (0, 1, 2, 3, 4, 255, 65536, 2**32 - 1) if n != right])
    kinds = (gguf_files.number(value), gguf_files.real(float(right)), (8, gguf_files.text("3")))
    draft.replace(name, *draw.choice(kinds))
    if name == "split.count" and draft is drafts[0] and draw.random() < 0.2:
        draft.remove(name)
    return _written(drafts, paths)


def _gguf_tensors(folder: Path, draw: random.Random) -> Path:
    drafts, paths = _split(folder)
    at = draw.randrange(3)
    # a model without `output` has that of its embeddings
    tensor = draw.choice([t for t in drafts[at].tensors if t.name != b"output.weight"])
    if draw.random() < 0.5:
        drafts[(at + 1) % 3].tensors.append(tensor)
    else:
        drafts[at].tensors.remove(tensor)
    return _written(drafts, paths)


def _gguf_names(folder: Path, draw: random.Random) -> Path:
    drafts, paths = _split(folder)
    _written(drafts, paths)
    match draw.randrange(3):
        case 0:
            return paths[draw.randrange(1, 3)]
        case 1:
            paths[1].rename(folder / "x")
            paths[2].rename(paths[1])
            (folder / "x").rename(paths[2])
            return paths[0]
        case _:
            return paths[0].rename(folder / draw.choice(("m.gguf", "m-00001-of-00002.gguf")))


_WRITERS: Mapping[str, Callable[[Path, random.Random], Path]] = {
    "shard": _shard,
    "bytes after a shard": _bytes_after_a_shard,
    "index": _index,
    "odd index": _odd_index,
    "split": _gguf_file,
    "number of a split": _gguf_number,
    "tensors of splits": _gguf_tensors,
    "names of splits": _gguf_names,
}


def case(folder: Path, draw: random.Random) -> list[str]:
    import_all(folder / _SEED)
    return refused(_WRITERS, folder, draw, 3 << 30)
