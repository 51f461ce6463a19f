"""Missing or damaged files of checkpoints are reported by name, before torch is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.errors import CaptureError, UsageError
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


def sets(value: object, *names: str, file: str = CONFIG) -> Callable[[Path], None]:
    """Sets a field, which may be in others."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_bytes())
        inner = content
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def links(name: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder.parent / "secret").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

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
    (says("num_labels", 10**9), "num_labels is 1,000,000,000, and the weights next to it hold no"),
    (says("num_labels", 10**9, "text_config"), "num_labels is 1,000,000,000, and the weights"),
    (says("num_local_experts", 10**6), "num_local_experts is 1,000,000, and the weights next to"),
    (says("num_key_value_heads", 10**6), "num_key_value_heads is 1,000,000, and the weights next"),
    (says("n_group", 10**9), "n_group is 1,000,000,000, and the weights next to it hold no"),
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

HUB = "code of the hub, which moec does not run: remove the field"
CODE = [
    (sets("org/kernel", "_attn_implementation"), f"_attn_implementation is 'org/kernel', {HUB}"),
    (sets("o/k@main:f", "attn_implementation"), f"attn_implementation is 'o/k@main:f', {HUB}"),
    (sets("paged|o/k", "_attn_implementation"), f"_attn_implementation is 'paged|o/k', {HUB}"),
    (
        sets({"": "sdpa", "text_config": "o/k"}, "attn_implementation"),
        f"text_config is 'o/k', {HUB}",
    ),
    (sets("o/k", "text_config", "_attn_implementation"), f"_attn_implementation is 'o/k', {HUB}"),
    (sets("o/k", "experts_implementation"), f"experts_implementation is 'o/k', {HUB}"),
    (sets("o/k", "_experts_implementation_internal"), f"_internal is 'o/k', {HUB}"),
    (sets("o/k", "per_layer_config", "3", "_attn_implementation"), f"is 'o/k', {HUB}"),
    (sets("o/k", "chunkwise_kernel"), f"chunkwise_kernel is 'o/k', {HUB}"),
    (sets(["o/k"], "hub_kernels"), f"hub_kernels is 'o/k', {HUB}"),
    (sets("hf-hub:o/m", "vision_config", "architecture"), f"architecture is 'hf-hub:o/m', {HUB}"),
    (sets("o/k", "cache_implementation", file="generation_config.json"), f"is 'o/k', {HUB}"),
    (sets({"AutoModel": "x.M"}, "text_config", "auto_map"), "brings its own code (auto_map)"),
    (sets({"a": {"impl": "x.P"}}, "custom_pipelines"), "brings its own code (custom_pipelines)"),
    (sets({"patch_embeddings": True}, "fusion_config"), "brings its own code (fusion_config)"),
    (sets({"kernel_mapping": {}}, "kernel_config"), "brings its own code (kernel_config)"),
    (sets(["config.4.0.json"], "configuration_files"), "configuration_files names other files"),
    (sets("../w.safetensors", "transformers_weights"), "transformers_weights names other files"),
    (writes("adapter_config.json", b"{}"), "has an adapter (adapter_config.json) and a model: "),
    (links("chat_template.jinja", "../secret"), "chat_template.jinja leads out of its folder"),
    (links("special_tokens_map.json", "/etc/hostname"), "leads out of its folder"),
]
HARMLESS = [
    sets("flash_attention_2", "_attn_implementation"),
    sets(None, "attn_implementation"),
    sets({"": "eager", "text_config": None}, "attn_implementation"),
    sets(False, "_attn_implementation_autoset"),
    sets("grouped_mm", "experts_implementation"),
    sets("hybrid", "cache_implementation"),
    sets("org/model", "_name_or_path"),
    sets(4, "conv_kernel"),
    sets({}, "auto_map"),
    sets([0.0, float("inf")], "time_step_limit"),
    sets([0.0, {"__float__": "Infinity"}], "text_config", "time_step_limit"),
    links("chat_template.jinja", "tokenizer_config.json"),
]


NUMBER = "which is no number to compute with: copy the file again from the source"
NO_NUMBERS = [
    (sets(float("nan"), "rms_norm_eps"), f"rms_norm_eps is nan, {NUMBER}"),
    (sets(float("inf"), "rope_theta"), f"rope_theta is inf, {NUMBER}"),
    (sets(-float("inf"), "text_config", "a"), f"text_config.a is -inf, {NUMBER}"),
    (sets([1.0, float("nan")], "factors"), f"factors is nan, {NUMBER}"),
    (sets([[1.0], [float("inf")]], "tables"), f"tables is inf, {NUMBER}"),
    (sets({"__float__": "NaN"}, "rms_norm_eps"), f"rms_norm_eps is nan, {NUMBER}"),
    (sets(float("nan"), "time_step_limit"), f"time_step_limit is nan, {NUMBER}"),
    (
        sets(float("nan"), "temperature", file="generation_config.json"),
        f"temperature is nan, {NUMBER}",
    ),
]


NO_NAMES = "which is not a list of names: copy the file again from the source"
NO_TOKEN = "which is not the number of a token, or a list of them: copy the file again"
TYPES = [
    (sets(5, "architectures"), f"architectures is '5', {NO_NAMES}"),
    (sets("x", "architectures"), f"architectures is 'x', {NO_NAMES}"),
    (sets({}, "architectures"), NO_NAMES),
    (sets([5], "architectures"), f"architectures is '[5]', {NO_NAMES}"),
    (
        sets(True, "text_config", "architectures"),
        f"text_config.architectures is 'True', {NO_NAMES}",
    ),
    (sets("x", "eos_token_id"), f"config.json: eos_token_id is 'x', {NO_TOKEN}"),
    (sets(["x"], "eos_token_id"), NO_TOKEN),
    (sets([[5]], "eos_token_id"), NO_TOKEN),
    (sets(1.5, "pad_token_id"), f"pad_token_id is '1.5', {NO_TOKEN}"),
    (sets(True, "bos_token_id"), f"bos_token_id is 'True', {NO_TOKEN}"),
    (sets({}, "decoder_start_token_id"), f"decoder_start_token_id is '{{}}', {NO_TOKEN}"),
    (
        sets("x", "eos_token_id", file="generation_config.json"),
        f"n_config.json: eos_token_id is 'x', {NO_TOKEN}",
    ),
]


@pytest.mark.parametrize(("damage", "words"), NO_NUMBERS + TYPES + DAMAGED)
def test_damaged(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    """JSON has no NaN and no infinity, but Python reads and writes both."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(CaptureError) as caught:
        check_checkpoint(folder)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(("damage", "words"), CODE)
def test_no_file_chooses_code_or_other_files(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(UsageError) as caught:
        check_checkpoint(folder)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("change", HARMLESS)
def test_names_of_transformers_itself_are_no_code(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    change(folder)
    check_checkpoint(folder)


def test_intact() -> None:
    assert check_checkpoint(CHECKPOINT)["model_type"] == "qwen3_moe"
