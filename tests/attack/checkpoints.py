"""Checkpoints whose files choose what a stranger's may not: code and models of the hub, other
files, numbers that are none."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from transformers.integrations import hub_kernels

from moec.capture.doors import open_source
from moec.errors import MoecError
from moec.files.checkpoint import CONFIG
from tests.attack.mutate import mutated_json

_TINY = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
_NAME = "case_checkpoint"
_FIELDS = (
    *("_attn_implementation", "attn_implementation", "_experts_implementation"),
    *("experts_implementation", "_attn_implementation_internal", "linear_attn_implementation"),
    *("auto_map", "custom_pipelines", "fusion_config", "kernel_config", "hub_kernels"),
    *("configuration_files", "transformers_weights", "custom_generate", "quantization_config"),
    *("tokenizer_class", "_name_or_path", "architecture", "backbone", "use_kernels"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "model_type", "architectures"),
)
_CODE: tuple[Any, ...] = (
    *("org/kernel", "org/kernel@main:run", "paged|org/kernel", "kernels-community/flash-attn2"),
    *("hf-hub:org/model", "local-dir:/etc", "../../config.json", "/etc/passwd", "os.system"),
    *("flash_attention_2", "sdpa", "eager", "batched_mm", "module.Class", "org/repo--module.Class"),
    {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    {"": "org/kernel", "text_config": "org/kernel"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
    ["config.4.0.0.json", "config.5.0.0.json"],
    *(float("nan"), float("inf"), -float("inf"), {"__float__": "NaN"}, [], {}, None, True),
)
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_EVIL = "import os\nos.system('touch evil')\nraise SystemExit(3)\n"


def checkpoint_case(folder: Path, draw: random.Random) -> list[str]:
    """The faults as a checkpoint is opened that has one to three odd fields, perhaps nested, and
    perhaps odd files beside it. The process has the package `kernels`, and may use the hub."""
    path = _written(folder, draw)
    loaded: list[str] = []

    def get_kernel(name: str, *args: Any, **kwargs: Any) -> Any:
        loaded.append(f"loads the kernel {name}")
        raise FileNotFoundError(name)

    with ExitStack() as stack:
        for module, name, value in (
            (constants, "HF_HUB_OFFLINE", False),
            (hub_kernels, "is_kernels_available", lambda: True),
            (hub_kernels, "_kernels_enabled", True),
            (hub_kernels, "get_kernel", get_kernel),
        ):
            stack.enter_context(patch.object(module, name, value))
        try:
            model: Any = open_source(path).model
        except MoecError as error:
            return loaded if str(error) else [*loaded, f"{type(error).__name__} without a word"]
        except Exception as error:
            return [*loaded, f"ends in {error!r}"]
    if model.config._attn_implementation not in ("sdpa", "eager"):
        loaded.append(f"attention is {model.config._attn_implementation}")
    weights = [*model.parameters()]
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        loaded.append("weights are not finite")
    return loaded


def _written(folder: Path, draw: random.Random) -> Path:
    path = folder / _NAME
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_TINY, path, copy_function=shutil.copy)
    for _ in range(draw.randint(1, 3)):
        file = path / (CONFIG if draw.random() < 0.7 else draw.choice(_FILES))
        content = json.loads(file.read_text())
        inner = content
        while draw.random() < 0.3:
            name = draw.choice(("text_config", "vision_config", "per_layer_config", "0"))
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                inner = content
        inner[draw.choice(_FIELDS)] = draw.choice(_CODE)
        if draw.random() < 0.1:
            content = mutated_json(content, draw)
        file.write_text(json.dumps(content))
    if draw.random() < 0.4:
        draw.choice(_BESIDE)(path)
    return path


def _code(path: Path) -> None:
    for name in ("evil.py", "modeling.py", "custom_generate/generate.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(_EVIL)


def _adapter(path: Path) -> None:
    base = {"base_model_name_or_path": "org/model", "peft_type": "LORA", "auto_mapping": {}}
    (path / "adapter_config.json").write_text(json.dumps(base))


def _link(path: Path) -> None:
    (path / "chat_template.jinja").symlink_to("/etc/hostname")


def _pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "other.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")


_BESIDE: tuple[Callable[[Path], None], ...] = (_code, _adapter, _link, _pickle)
