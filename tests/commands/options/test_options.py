"""An option of `moec.compile` is one field: all else follows from it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import moec
from docs.catalogue import api_page
from moec.cache import store_in
from moec.commands import compile as module
from moec.commands.compilation.request import cache_key, request_of
from moec.errors import UsageError
from moec.options import CompileKeywords, CompileOptions, compile_options, option
from tests.commands.conftest import FakeCompiler


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[click.Command]:
    """`moec compile`, imported anew with one more field."""

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Planted(CompileOptions):
        planted: bool = option(False, "What a test planted.", "--planted", ranks=True)

    with monkeypatch.context() as patch:
        patch.setattr("moec.options.CompileOptions", Planted)
        yield importlib.reload(module).command
    importlib.reload(module)


def key(model: Path, tmp_path: Path, command: click.Command, **values: Any) -> str | None:
    context = command.make_context("compile", [str(model), "-o", str(tmp_path / "x.moec")])
    request = request_of({**context.params, **values})
    start = cache_key(request, store_in(tmp_path / "cache"))
    return start and start.start


def test_one_field_is_an_option_everywhere(
    command: click.Command, tmp_path: Path, short_moe: Path
) -> None:
    model, x = torch.nn.Identity(), (torch.ones(2, 3),)
    assert moec.compile(model, x, stop_after="capture", planted=True).pass_results  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="planted is 3: give True or False"):
        moec.compile(model, x, planted=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"has no option plantd; did you mean 'planted'"):
        moec.compile(model, x, plantd=True)  # type: ignore[call-arg]
    assert key(short_moe, tmp_path, command) != key(short_moe, tmp_path, command, planted=True)
    assert "| `planted` | `--planted` | `False` | What a test planted. |" in api_page()


def test_the_command_line_has_it_and_gives_it_on(
    command: click.Command, compiler: FakeCompiler, tmp_path: Path
) -> None:
    assert "What a test planted." in CliRunner().invoke(command, ["--help"]).output
    CliRunner().invoke(command, ["model", "-o", str(tmp_path / "x.moec"), "--planted"])
    assert compiler.request["planted"] is True


def test_every_option_of_the_command_line_is_in_the_key(short_moe: Path, tmp_path: Path) -> None:
    """But those that change no artifact; those that name other files are not cached at all."""
    plain = key(short_moe, tmp_path, module.command)
    for name, each in compile_options().items():
        if each.flags:
            value = (name,) if each.kind == "list" else name
            other = key(short_moe, tmp_path, module.command, **{name: value})
            assert (other is None) == (each.reads or name == "stop_after"), name
            assert (other == plain) == (not each.artifact), name


def test_the_keywords_are_the_fields() -> None:
    keywords = {
        name: hint.__forward_arg__ for name, hint in CompileKeywords.__annotations__.items()
    }
    assert keywords == CompileOptions.__annotations__


@pytest.mark.parametrize(("name", "value", "words"), [
    ("fuel", -1, "give the greatest number of rewrites, 0 or more"),
    ("backend", "cpu", "give a moec.codegen.backend.Backend"),
    ("watch", 5, "give a function that takes a PassResult"),
    ("progress", 5, "give a function that takes a string"),
    ("dynamic_shapes", 5, "give the dynamic_shapes of torch.export: a dict by input, or a"),
    ("descriptions", 5, "give a list of the results of moec.describe"),
    ("constants", 5, "give the names of inputs"),
    ("store", "yes", "give True or False"),
    ("kv_cache", "no", "give True or False"),
])  # fmt: skip
def test_values_of_the_wrong_kind(name: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        CompileOptions(**{name: value})
    assert f"{name} is {value!r}: {words}" in str(raised.value)
