"""A module may replace a value as a whole to change one part of it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.errors import CaptureError

X = torch.randn(3, 4)


class Settings(NamedTuple):
    calls: int = 0
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    calls: int = 0
    scale: float = 2.0


class Kept(nn.Module):
    """Counts in a value that each call replaces."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(4, 4), config

    def count(self) -> None:
        config = self.config
        match config:
            case Settings():
                self.config = config._replace(calls=config.calls + 1)
            case Frozen():
                self.config = dataclasses.replace(config, calls=config.calls + 1)
            case SimpleNamespace():
                self.config = SimpleNamespace(calls=config.calls + 1, scale=config.scale)
            case dict():
                self.config = {**config, "calls": config["calls"] + 1}
            case _:
                self.config = (config[0] + 1, config[1])

    def read(self, name: str) -> Any:
        match self.config:
            case dict():
                return self.config[name]
            case Settings() | Frozen() | SimpleNamespace():
                return getattr(self.config, name)
            case _:
                return self.config[("calls", "scale").index(name)]


class Scaled(Kept):
    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.linear(x) * self.read("scale")


class Counted(Kept):
    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.linear(x) * self.read("calls")


class Grows(Kept):
    def forward(self, x: Tensor) -> Tensor:
        self.count()
        if self.read("calls") == 60:
            self.config = Settings(self.read("calls"), 3.0)
        return self.linear(x) * self.read("scale")


CONFIGS = {
    "named": (Settings(), "self.config"),
    "frozen": (Frozen(), "self.config"),
    "namespace": (SimpleNamespace(calls=0, scale=2.0), "self.config"),
    "dict": ({"calls": 0, "scale": 2.0}, "self.config"),
    "tuple": ((0, 2.0), "self.config"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_that_no_call_changes_may_be_read(name: str) -> None:
    config, words = CONFIGS[name]
    scaled = Scaled(config).eval()
    assert earlier_calls(scaled, (X,), {}).slots
    assert scaled.config is config
    with pytest.raises(CaptureError) as refusal:
        earlier_calls(Counted(config).eval(), (X,), {})
    assert f"its result depends on {words}, which changes" in str(refusal.value)


def test_a_branch_that_a_later_call_takes_is_noted() -> None:
    notes = earlier_calls(Grows(Settings()).eval(), (X,), {}).notes
    assert any("`return getattr(self.config, name)` has the value of" in note for note in notes)


def test_a_module_that_replaces_its_settings_is_compiled() -> None:
    module = Scaled(Settings()).eval()
    compiled = moec.compile(module, (X,), build=False, verify=False)
    assert module.config == Settings()
    note = (
        "calls of the compiled model do not set self.config; "
        "capture ran the module, and put them back"
    )
    assert note in compiled.report().notes
