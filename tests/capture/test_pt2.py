"""A .pt2 file is read if it holds only tensors and a graph, and refused if it could run code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moec.capture.doors import check_archive, open_source
from moec.errors import CaptureError


class Halves(nn.Module):
    """Sizes that are expressions, a constant, a weight that is stored by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        n = x.shape[0]
        return {"half": self.linear(x)[: n // 2], "sum": (x + y).reshape(n * 2, 2) * 3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "halves.pt2"
    example = (torch.randn(6, 4), torch.randn(6, 4))
    shapes = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    exported = torch.export.export(Halves(), example, dynamic_shapes=shapes)
    torch.export.save(exported, path)
    return path


def forged(original: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(original) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def refused(path: Path) -> str:
    with pytest.raises(CaptureError) as caught:
        open_source(path)
    words = str(caught.value)
    assert "load it yourself with torch.export.load" in words
    return words


def test_what_torch_saves_is_read(original: Path) -> None:
    check_archive(original)
    assert isinstance(open_source(original).model, torch.export.ExportedProgram)


def test_sample_inputs_are_not_unpickled(original: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        (name,) = (n for n in members if n.endswith("sample_inputs/halves.pt") or
                   n.endswith("sample_inputs/model.pt"))  # fmt: skip
        members[name] = pickle.dumps(Evil(tmp_path / "run"))

    words = refused(forged(original, tmp_path / "evil.pt2", change))
    assert "it holds Python objects that unpickling would make" in words
    assert not (tmp_path / "run").exists()


def test_nor_where_their_name_is_in_capitals(original: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        (name,) = (n for n in members if "sample_inputs" in n)
        del members[name]
        folder, _, rest = name.partition("/data")
        members[folder + "/DATA" + rest.upper()] = pickle.dumps(Evil(tmp_path / "run"))

    refused(forged(original, tmp_path / "evil.pt2", change))
    assert not (tmp_path / "run").exists()


def edited(change: Callable[[dict[str, Any]], None], ending: str = "models/model.json") -> Any:
    def edit(members: dict[str, bytes]) -> None:
        (name,) = (n for n in members if n.endswith(ending))
        document = json.loads(members[name])
        change(document)
        members[name] = json.dumps(document).encode()

    return edit


def graph_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["graph_module"]["graph"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__base__.__subclasses__()",
        "Symbol('s0').func.__globals__",
        "exec('1')",
        "[x for x in (1,)]",
        "lambda: 1",
        "(" * 200 + "1" + ")" * 200 + "if",
    ],
)
def test_a_size_is_arithmetic(original: Path, tmp_path: Path, text: str) -> None:
    def change(document: dict[str, Any]) -> None:
        for value in graph_of(document)["sym_int_values"].values():
            value["as_expr"]["expr_str"] = text

    words = refused(forged(original, tmp_path / "evil.pt2", edited(change)))
    assert "is more than the arithmetic of a size" in words


def test_a_guard_is_arithmetic(original: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["guards_code"] = ["__import__('os').getpid() > 0"]

    assert "arithmetic" in refused(forged(original, tmp_path / "evil.pt2", edited(change)))


@pytest.mark.parametrize("target", ["torch.hub.load", "torch.load", "torch.ops.load_library", "#x"])
def test_a_node_calls_an_operator(original: Path, tmp_path: Path, target: str) -> None:
    def change(document: dict[str, Any]) -> None:
        graph_of(document)["nodes"][0]["target"] = target

    words = refused(forged(original, tmp_path / "evil.pt2", edited(change)))
    assert f"a node calls {target!r}" in words


def test_compiled_code(original: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        folder = next(iter(members)).partition("/")[0]
        members[f"{folder}/data/aotinductor/model/model.so"] = b"code"

    assert "it is compiled code" in refused(forged(original, tmp_path / "evil.pt2", change))


def test_objects_that_are_constants(original: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        folder = next(iter(members)).partition("/")[0]
        members[f"{folder}/data/constants/opaque_obj_0"] = pickle.dumps(Evil(tmp_path / "run"))

    assert "it is a pickled object" in refused(forged(original, tmp_path / "evil.pt2", change))


@pytest.mark.parametrize(
    "context", ["default_factory_module", "\\u0064efault_factory_module", "__enum__"]
)
def test_types_of_arguments(original: Path, tmp_path: Path, context: str) -> None:
    def change(document: dict[str, Any]) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = f'[1, {{"type": "x", "context": "{context}"}}]'

    assert "importing a module" in refused(forged(original, tmp_path / "evil.pt2", edited(change)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(original: Path, tmp_path: Path) -> None:
    path = forged(original, tmp_path / "evil.pt2", lambda members: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"")
    assert "two of its members have one name" in refused(path)


def test_a_weight_that_is_not_there(original: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        entry = next(iter(document["config"].values()))
        entry |= {"use_pickle": True, "path_name": "../gone"}

    path = forged(
        original, tmp_path / "evil.pt2", edited(change, "weights/model_weights_config.json")
    )
    with pytest.raises(CaptureError, match="cannot be read as a torch"):
        open_source(path)
