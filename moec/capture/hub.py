"""Checkpoints are loaded and run without the hub: neither files nor kernels come from it. What a
user names by its id there is downloaded before.

transformers loads some kernels from the hub when a model is made or first run, if the package
`kernels` is installed. The environment of the process, and of its children, stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Never

from moec.model_path import check_no_revision, local_path


class _Hub:
    """The switches of the hub in this process: off while one of several threads wants it off."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.before: tuple[Any, Any] = (None, None)

    def switch_off(self) -> None:
        from huggingface_hub import constants
        from transformers.integrations import hub_kernels

        with self.lock:
            if not self.users:
                self.before = constants.HF_HUB_OFFLINE, hub_kernels.get_kernel
                constants.HF_HUB_OFFLINE, hub_kernels.get_kernel = True, _refuse
            self.users += 1

    def put_back(self) -> None:
        from huggingface_hub import constants
        from transformers.integrations import hub_kernels

        with self.lock:
            self.users -= 1
            if not self.users:
                constants.HF_HUB_OFFLINE, hub_kernels.get_kernel = self.before


_HUB = _Hub()


@contextmanager
def hub_off() -> Iterator[None]:
    """While open, huggingface_hub sends no request and transformers takes no kernel of the hub,
    from its cache either, in all threads of the process."""
    _HUB.switch_off()
    try:
        yield
    finally:
        _HUB.put_back()


def own_config(folder: Path) -> Any:
    """The configuration of a checkpoint, with transformers' own choice of the implementations of
    attention and experts, whatever its files say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = config._experts_implementation = None  # also of those in it
    return config


@contextmanager
def local_model(model: Any, revision: str | None) -> Iterator[Any]:
    """The model, or the path of what is downloaded for an id of the hub, at `revision`. While open,
    the hub is off where it is a checkpoint."""
    if isinstance(model, str):
        model = local_path(model, revision)
    else:
        check_no_revision(type(model).__name__, revision)
    with hub_off() if _is_checkpoint(model) else nullcontext():
        yield model


def _is_checkpoint(model: Any) -> bool:
    try:
        return (
            isinstance(model, str | Path)
            and (Path(model).is_dir() or Path(model).suffix == ".gguf")
            and find_spec("transformers") is not None
        )
    except (OSError, ValueError):  # no path: the error is reported where it is opened
        return False


def _refuse(kernel: str, *args: Any, **kwargs: Any) -> Never:
    # where a kernel is only faster, transformers computes without it after this error
    raise FileNotFoundError(f"moec loads no code of the hub, so the kernel {kernel} is missing")
