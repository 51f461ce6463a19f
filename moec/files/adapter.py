"""The configuration of an adapter of PEFT: what it does, and that nothing of it is ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moec.errors import CaptureError, SetupError
from moec.files.checkpoint import json_object
from moec.files.config_fields import ADAPTER_CONFIG
from moec.spelling import did_you_mean_file

WEIGHTS = "adapter_model.safetensors"
_ABOUT_TRAINING = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout runtime_config "
    "megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size".split()
)
"""Fields that do not change what a trained adapter computes: its tensors say which weights it
changes."""
_HONOURED = frozenset(
    "r lora_alpha rank_pattern alpha_pattern use_rslora use_dora fan_in_fan_out bias lora_bias "
    "modules_to_save target_parameters init_lora_weights".split()
)
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""The values of init_lora_weights with which training starts from the base model as it is."""


@dataclass(frozen=True)
class LoraFields:
    """The fields of adapter_config.json that say what an adapter computes. Patterns are regular
    expressions for names of modules, of which the first that matches counts."""

    r: Annotated[int, msgspec.Meta(gt=0)]
    lora_alpha: float
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(gt=0)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    target_parameters: list[str] | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter in a folder."""

    folder: Path
    fields: LoraFields

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def rank_of(self, module: str) -> int:
        return int(_of_pattern(self.fields.rank_pattern, module, self.fields.r))

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _of_pattern(self.fields.alpha_pattern, module, self.fields.lora_alpha)
        return alpha / (math.sqrt(rank) if self.fields.use_rslora else rank)


def read_adapter(folder: Path) -> AdapterConfig:
    """The adapter in a folder.

    Raises UsageError where the folder has none, or one that does more than moec honours, and
    CaptureError where a file is damaged.
    """
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise SetupError(f"the adapter {folder} is no folder{did_you_mean_file(folder)}")
    if not path.is_file():
        raise SetupError(f"{folder} is no adapter of PEFT: it has no {ADAPTER_CONFIG}")
    if not (folder / WEIGHTS).is_file():
        pickled = " but adapter_model.bin, which is pickled: save it again with PEFT"
        other = pickled if (folder / "adapter_model.bin").exists() else ""
        raise SetupError(f"{folder} has no {WEIGHTS}{other}")
    config = json_object(path)
    _check_honoured(path, config)
    try:
        fields = msgspec.convert(config, LoraFields)
        for pattern in (*(fields.rank_pattern or ()), *(fields.alpha_pattern or ())):
            re.compile(pattern)
    except (msgspec.ValidationError, re.error) as error:
        raise CaptureError(
            f"{path} is malformed: {error}; copy it again from the source of the adapter"
        ) from None
    return AdapterConfig(folder, fields)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter changes, as it says itself; empty without one."""
    return str(json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def _check_honoured(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SetupError(f"{path}: peft_type is {kind!r}, and moec merges LORA only")
    for name, value in config.items():
        if name not in _ABOUT_TRAINING | _HONOURED and value not in (None, False, [], {}, ""):
            raise SetupError(
                f"{path}: {name} is {json.dumps(value)[:80]}, which moec does not honour: merge "
                "the adapter with PEFT (merge_and_unload) and save that model"
            )
    start = config.get("init_lora_weights", True)
    if start not in _KEEP_THE_BASE:
        raise SetupError(
            f"{path}: init_lora_weights is {start!r}, with which training changed the base model "
            "too: save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _of_pattern(values: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches a name, or its end after a dot."""
    patterns = (values or {}).items()
    return next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module)), default)
