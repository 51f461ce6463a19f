"""A checkpoint is loaded and run with the hub off; afterwards the process is as before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, is_offline_mode
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

import moec
from moec.capture.doors import open_source
from moec.capture.hub import hub_off
from moec.commands.bench import load_eager
from moec.errors import UsageError


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of hub kernels that are loaded: a process that may use the hub, with the package
    `kernels`."""
    names: list[str] = []

    def get_kernel(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    return names


def with_field(tiny_moe: Path, folder: Path, **fields: object) -> Path:
    shutil.copytree(tiny_moe, folder, copy_function=shutil.copy)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "load", [open_source, lambda path: load_eager(path, None)], ids=["open", "bench"]
)
def test_no_kernel_that_a_file_names_is_loaded(
    load: Callable[[str], Any], tiny_moe: Path, tmp_path: Path, kernels: list[str]
) -> None:
    folder = with_field(tiny_moe, tmp_path / "model", _attn_implementation="org/kernel")
    with pytest.raises(
        UsageError, match=r"config\.json: _attn_implementation is 'org/kernel', code"
    ):
        load(str(folder))
    assert kernels == []


def test_the_files_choice_of_attention_has_no_effect(
    tiny_moe: Path, tmp_path: Path, kernels: list[str]
) -> None:
    """flash_attention_2 is not installed: transformers would take it from the hub, or fail."""
    folder = with_field(tiny_moe, tmp_path / "model", _attn_implementation="flash_attention_2")
    model: Any = open_source(str(folder)).model
    assert model.config._attn_implementation == "sdpa"
    assert kernels == []


def test_the_hub_is_off_while_a_checkpoint_runs(
    short_moe: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where eager is run, for the comparison, and for modules that load kernels lazily."""
    environment, offline = dict(os.environ), []
    forward = Qwen3MoeModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        offline.append(is_offline_mode())
        hub_kernels.lazy_load_kernel("finegrained-fp8")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3MoeModel, "forward", watched)
    moec.compile(short_moe, target="null", verify=False)
    assert offline
    assert all(offline)
    assert kernels == []
    assert not is_offline_mode()
    assert dict(os.environ) == environment
    hub_kernels.lazy_load_kernel("finegrained-fp8")
    assert kernels == ["kernels-community/finegrained-fp8"]


def test_a_module_of_the_caller_may_use_the_hub(
    short_moe: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).eval()
    offline = []
    forward = type(model.model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        offline.append(is_offline_mode())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", watched)
    ids = torch.tensor([[1, 2, 3]])
    moec.compile(model, (), {"input_ids": ids, "use_cache": False}, target="null", verify=False)
    assert offline
    assert not any(offline)


def test_an_error_switches_the_hub_on_again(kernels: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), hub_off():
        raise ZeroDivisionError
    assert not is_offline_mode()


def test_of_two_threads_the_last_one_switches_the_hub_on(kernels: list[str]) -> None:
    first, second = hub_off(), hub_off()
    with first:
        second.__enter__()
    assert is_offline_mode()
    second.__exit__(None, None, None)
    assert not is_offline_mode()


def test_pickled_weights_beside_others_are_not_read(tiny_moe: Path, tmp_path: Path) -> None:
    """transformers would read pytorch_model.bin where model.safetensors has another name."""
    folder = with_field(tiny_moe, tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save({name: weight * 2 for name, weight in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    model: Any = open_source(str(folder)).model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
