"""The inputs of moec: a module, an export, a checkpoint, a .pt2, a factory; and invalid ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.capture import capture
from moec.capture.doors import open_source
from moec.capture.source import Source
from moec.errors import CaptureError, MoecError, UsageError
from moec.ir.interpret.evaluate import evaluate
from tests.capture.modules import WIDTH, Moe

x = torch.randn(5, WIDTH)


def captured(source: Source) -> Any:
    return capture(
        source.model,
        source.args,
        source.kwargs,
        dynamic_shapes=source.dynamic_shapes,
        bounds=source.bounds,
    )


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "moe.pt2"
    rows = torch.export.Dim("rows", min=2, max=64)
    torch.export.save(torch.export.export(Moe(), (x,), dynamic_shapes=({0: rows},)), path)
    return path


def test_a_pt2(pt2: Path) -> None:
    capture = captured(open_source(pt2))
    (value,) = capture.program.graph.inputs
    assert (value.name, [str(d) for d in value.shape]) == ("x", ["T", "8"])
    assert capture.program.graph.bounds["T"].high == 64
    other = torch.randn(9, WIDTH)
    (result,) = evaluate(capture.program.graph, (other,), capture.program.weights)
    assert torch.allclose(result, Moe()(other), atol=1e-5)
    assert torch.equal(capture.example[0], x)


def test_examples_for_a_pt2(pt2: Path) -> None:
    other = torch.randn(3, WIDTH)
    assert captured(open_source(pt2, (other,))).example[0] is other
    with pytest.raises(CaptureError, match="was not exported with arguments such as these: it ta"):
        captured(open_source(pt2, (other, other)))


def test_a_checkpoint(tiny_moe: Path) -> None:
    source = open_source(str(tiny_moe))
    assert source.name == "tiny_moe/checkpoint"
    assert source.kwargs.keys() == {"input_ids", "use_cache"}
    assert "tokenizer/tokenizer.json" in source.files
    longest = json.loads((tiny_moe / "config.json").read_text())["max_position_embeddings"]
    assert source.bounds["S"].high == longest


def test_examples_for_a_checkpoint(tiny_moe: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    source = open_source(tiny_moe, (), {"input_ids": ids})
    assert source.kwargs["input_ids"] is ids
    assert source.kwargs["use_cache"] is False


FACTORY = """
import torch
from torch.export import Dim

def two():
    return torch.nn.Linear(8, 8), (torch.randn(3, 8),)

def named():
    return torch.nn.Linear(8, 8), {"input": torch.randn(3, 8)}

def three():
    return torch.nn.Linear(8, 8), (torch.randn(3, 8),), {"input": {0: Dim("rows", max=9)}}
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "factory_of_tests.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize(("name", "size"), [("two", "T"), ("named", "T"), ("three", "rows")])
def test_a_factory(factory: Path, name: str, size: str) -> None:
    (value,) = captured(open_source(f"{factory}:{name}")).program.graph.inputs
    assert (value.name, str(value.shape[0])) == ("input", size)


def test_a_factory_gives_its_own_examples(factory: Path) -> None:
    with pytest.raises(UsageError, match="the factory gives the example inputs: leave yours out"):
        open_source(f"{factory}:two", (x,))


def test_what_is_no_model() -> None:
    with pytest.raises(UsageError, match="a dict is not a model: give a torch module, an exported"):
        open_source({})
    with pytest.raises(UsageError, match=r"Moe needs example inputs: moec.compile\(model, \(input"):
        open_source(Moe())


def broken(folder: Path, tiny: Path, how: str) -> Path:
    """A folder or file that is wrong in one way."""
    path = folder / "model"
    if how == "an empty folder":
        path.mkdir()
    elif how == "a text file":
        path.write_text("hello")
    elif how == "no .pt2":
        path = folder / "model.pt2"
        path.write_bytes(b"not a zip")
    else:
        shutil.copytree(tiny, path, copy_function=shutil.copy)
        config = path / "config.json"
        if how == "config no JSON":
            config.write_text("{")
        elif how == "own code":
            settings = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "x.Model"}}
            config.write_text(json.dumps(settings))
        elif how == "unknown type":
            config.write_text(json.dumps({"model_type": "no_such_family"}))
        elif how == "no weights":
            for file in path.glob("*.safetensors"):
                file.unlink()
        elif how == "cut weights":
            (file,) = path.glob("*.safetensors")
            file.write_bytes(file.read_bytes()[:5000])
    return path


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("missing", UsageError, "does not exist: give the folder of a checkpoint"),
        ("an empty folder", UsageError, "is not a checkpoint: it has no config.json"),
        ("a text file", UsageError, "is not a model that moec can read"),
        ("no .pt2", CaptureError, "cannot be read as a torch.export program"),
        ("config no JSON", CaptureError, "config.json is not JSON: "),
        ("own code", UsageError, "brings its own code (auto_map), which moec does not run"),
        ("unknown type", CaptureError, "knows no model_type 'no_such_family'"),
        ("no weights", CaptureError, "has no .safetensors; save the model with save_pretrained"),
        ("cut weights", CaptureError, "model.safetensors is truncated or damaged"),
    ],
)
def test_broken_models(
    tmp_path: Path, tiny_moe: Path, how: str, kind: type[MoecError], words: str
) -> None:
    path = tmp_path / "nowhere" if how == "missing" else broken(tmp_path, tiny_moe, how)
    with pytest.raises(kind) as raised:
        open_source(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)


def test_weights_that_are_missing_or_of_another_size_are_named(
    tiny_moe: Path, tmp_path: Path
) -> None:
    """transformers initialises the first at random; for the second, it refers to the report
    above."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_moe, folder)
    weights = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    save_file({**weights, norm: weights[norm][:3].clone()}, folder / "model.safetensors")
    with pytest.raises(CaptureError, match=rf"weight {norm} is \[3\], and config.json makes it"):
        open_source(folder)
    del weights[norm]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CaptureError, match=f"lacks the weight {norm}: config.json is of another"):
        open_source(folder)
