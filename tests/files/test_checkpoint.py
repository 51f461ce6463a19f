"""Missing or damaged files of checkpoints are reported by name, before torch is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.errors import CaptureError
from moec.files.checkpoint import CONFIG, INDEX, check_checkpoint

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
WEIGHTS = "model.safetensors"


def writes(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def indexes(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def becomes_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def is_cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def says(name: str, number: int, part: str = "") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_bytes())
        (config.setdefault(part, {}) if part else config)[name] = number
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


SIZES = "the weights next to it hold 3,478,912 numbers: they are of different models"
DAMAGED = [
    (says("num_hidden_layers", 10**9), "num_hidden_layers is 1,000,000,000, and the weights"),
    (
        says("n_layer", 2000, "text_config"),
        "n_layer is 2,000, and the weights next to it hold 134",
    ),
    (says("hidden_size", 10**12), f"hidden_size is 1,000,000,000,000, and {SIZES}"),
    (says("num_local_experts", 10**8), f"num_local_experts is 100,000,000, and {SIZES}"),
    (says("vocab_size", 2**63), f"vocab_size is 9,223,372,036,854,775,808, and {SIZES}"),
    (writes(CONFIG, b'{"a":'), "config.json is not JSON: "),
    (writes(CONFIG, b""), "config.json is not JSON: "),
    (writes(CONFIG, b"\xff\xfe\x00"), "config.json is not JSON: "),
    (writes(CONFIG, b"[" * 100_000), "config.json is not JSON: maximum recursion depth"),
    (writes(CONFIG, b"[1]"), "config.json has no configuration of a model"),
    (writes("tokenizer.json", b"{"), "tokenizer.json is not JSON: "),
    (writes("generation_config.json", b"[]"), "generation_config.json has no JSON object"),
    (writes("tokenizer_config.json", b"5"), "tokenizer_config.json has no JSON object"),
    (writes(WEIGHTS, b""), "model.safetensors is truncated or damaged"),
    (writes(WEIGHTS, b"\1\0\0\0\0\0\0\0["), "model.safetensors is truncated or damaged"),
    (writes(WEIGHTS, b"\2\0\0\0\0\0\0\0[]"), "model.safetensors is truncated or damaged"),
    (writes(WEIGHTS, b"\xff" * 8), "model.safetensors is truncated or damaged"),
    (is_cut, "model.safetensors is truncated or damaged"),
    (becomes_a_folder, "model.safetensors cannot be read: it is a folder, not a file"),
    (lambda folder: (folder / WEIGHTS).unlink(), "has no .safetensors; save the model"),
    (
        indexes({"weight_map": {"a": "no-1.safetensors"}}),
        "names 'no-1.safetensors', which does not",
    ),
    (indexes({"weight_map": {"a": "../../x"}}), "names '../../x', which is not in its folder"),
    (indexes({"weight_map": {"a": 5}}), "has no weight_map, which names the file of each weight"),
    (indexes({}), "has no weight_map"),
    (indexes([]), f"{INDEX} has no JSON object"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGED)
def test_damaged(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(CaptureError) as caught:
        check_checkpoint(folder)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_intact() -> None:
    assert check_checkpoint(CHECKPOINT)["model_type"] == "qwen3_moe"
