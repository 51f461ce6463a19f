"""Choices of `moec optimize` as a file: equal for equal runs, applied, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.passes.approximate.choices.model_choices import ModelChoices, read_choices, write_choices

WIDTH = 64


class Net(torch.nn.Module):
    """Two linear layers: the result has a hundred times as much of the second one."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, width, bias=False)
        self.second = torch.nn.Linear(WIDTH, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 100 * self.second(x)


X = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(1))
ARGS = (torch.randn(5, WIDTH),)
ROOM = WIDTH * WIDTH * 26 // 16  # one layer in int4:32, one in int8, with their scales


def net(width: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(width)


def chosen() -> ModelChoices:
    searched = search(net(), ARGS, calib={"x": X}, formats=("int8", "int4:32"))
    return searched.choices(choice_limits(ROOM, None, None))


@pytest.fixture(scope="module")
def choices() -> ModelChoices:
    return chosen()


def nearest(choices: ModelChoices) -> ModelChoices:
    return msgspec.structs.replace(choices, codes="nearest")


def test_equal_runs_write_equal_files(choices: ModelChoices, tmp_path: Path) -> None:
    write_choices(choices, tmp_path / "a.yaml")
    write_choices(chosen(), tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    assert read_choices(tmp_path / "a.yaml") == choices


def test_the_file_has_the_bytes_and_the_damage_of_each_choice(choices: ModelChoices) -> None:
    first, second = choices.products["first"], choices.products["second"]
    assert (first.format, second.format) == ("int4:32", "int8")
    assert first.bytes_before == second.bytes_before == 4 * WIDTH * WIDTH
    assert first.bytes == WIDTH * (WIDTH // 2 + 2 * 2)
    assert choices.bytes == first.bytes + second.bytes
    assert choices.limits == "memory 6.7 kB"
    assert 0 < second.damage < choices.predicted


def test_a_file_is_applied(choices: ModelChoices, tmp_path: Path) -> None:
    write_choices(nearest(choices), path := tmp_path / "a.yaml")
    model = moec.compile(net(), ARGS, choices=path)
    assert {line.name: line.format for line in model.quantised} == {
        "first": "int4:32",
        "second": "int8",
    }
    assert "choose-experts: chose 1 int4:32, 1 int8" in "\n".join(model.report().notes)


def test_codes_of_a_file_need_its_data(choices: ModelChoices) -> None:
    gptq = msgspec.structs.replace(choices, codes="gptq")
    with pytest.raises(UsageError, match="codes that GPTQ chooses on data: give that of moec opt"):
        moec.compile(net(), ARGS, choices=gptq)
    model = moec.compile(net(), ARGS, choices=gptq, calib={"x": X})
    assert all(line.solved is not None for line in model.quantised)
    model = moec.compile(net(), ARGS, choices=nearest(choices), calib={"x": X})
    assert all(line.solved is None for line in model.quantised)


def test_another_model(choices: ModelChoices) -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.third = torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(x)

    with pytest.raises(UsageError, match="choices: the products differ at first: give those"):
        moec.compile(Other(), ARGS, choices=nearest(choices))
    message = "choices: the products differ at first: give those"
    with pytest.raises(UsageError, match=message):
        moec.compile(net(32), ARGS, choices=nearest(choices))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("codes:", "cods:", "unknown field `cods`"),
        ("codes: ", "codes: best #", "Invalid enum value 'best'"),
        ("version: 1", "version: 2", "Invalid enum value 2"),
        ("format: int8", "format: int7", "'int7' is not a format; write int8"),
        ("rows: 64", "rows: -64", "Expected `int` >= 0"),
        ("limits:", "limits: !!python/object/apply:os.getcwd []\nx:", "could not determine a con"),
        ("limits:", "[" * 5000, ""),
    ],
)
def test_another_file(
    before: str, after: str, message: str, choices: ModelChoices, tmp_path: Path
) -> None:
    write_choices(choices, path := tmp_path / "a.yaml")
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(UsageError, match=f"choices .*{message}"):
        read_choices(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: there is no such file"):
        moec.compile(net(), ARGS, choices=tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="choices is a int: give the path of their file"):
        moec.compile(net(), ARGS, choices=3)
    with pytest.raises(UsageError, match="choices have the formats of weights: leave quant out"):
        moec.compile(net(), ARGS, choices=tmp_path / "a.yaml", quant="int8")
