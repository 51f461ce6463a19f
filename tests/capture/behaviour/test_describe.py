"""A user's description of a module is proved against the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import moec
from moec import __main__ as front
from moec.capture.behaviour.describe import read_descriptions
from moec.errors import CaptureError, UsageError
from tests.capture.behaviour import look_alikes
from tests.capture.behaviour.modules import HINTS, TOP_K, WIDTH, CountsInNumpy


def compiled(description: Any, module: nn.Module | None = None) -> moec.CompiledModel:
    torch.manual_seed(0)
    module = (CountsInNumpy() if module is None else module).eval()
    x = torch.randn(2, 12, WIDTH)
    return moec.compile(module, (x,), build=False, descriptions=[description])


def plain(module: CountsInNumpy, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, WIDTH)
    weights, ids = module.choose(flat)
    full = torch.zeros(flat.shape[0], len(module.experts)).scatter(1, ids, weights)
    return sum(full[:, i, None] * e(flat) for i, e in enumerate(module.experts)).view_as(x)


def without_renormalising(module: CountsInNumpy, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, WIDTH)
    weights, ids = module.gate(flat).softmax(-1).topk(TOP_K, -1)
    full = torch.zeros(flat.shape[0], len(module.experts)).scatter(1, ids, weights)
    return sum(full[:, i, None] * e(flat) for i, e in enumerate(module.experts)).view_as(x)


def test_a_right_description_is_trusted() -> None:
    result = compiled(moec.describe(CountsInNumpy, **HINTS))
    assert [(b.experts, b.top_k) for b in result.blocks] == [(4, 2)]
    assert "was described by the user: experts=" in result.captured.notes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 1},
        {"score": "sigmoid"},
        {"renormalise": False},
        {"scale": 1.01},
        {"threshold_on": "weight", "threshold": 0.02},
        {"capacity": {"factor": 1}},
        {"weighs": "input"},
        {"correction": "gate.bias", "router": "gate"},
    ],
    ids=str,
)
def test_a_wrong_description_is_refused_with_the_input_that_shows_it(wrong: dict[str, Any]) -> None:
    module = CountsInNumpy()
    module.gate = nn.Linear(WIDTH, 4, bias=True)
    with pytest.raises(CaptureError) as raised:
        compiled(moec.describe(CountsInNumpy, **(HINTS | wrong)), module)
    text = str(raised.value)
    assert "a CountsInNumpy (modules.py:" in text
    assert "is not what it is described to be: output differs on" in text
    assert "begins" in text


@pytest.mark.parametrize(
    "misfit",
    [
        {"correction": "gate.weight"},
        {"router": "experts"},
        {"router": ["gate", "experts.0"]},
        {"experts": ["experts.0", "door"]},
        {"experts": ["experts.0", "gate"]},
    ],
    ids=str,
)
def test_a_description_of_parts_that_do_not_fit_is_refused(misfit: dict[str, Any]) -> None:
    words = "a CountsInNumpy .* is not what it is described to be: the description cannot be"
    with pytest.raises(CaptureError, match=words):
        compiled(moec.describe(CountsInNumpy, **(HINTS | misfit)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (look_alikes.Threshold, "output differs on"),
        (look_alikes.RareThreshold, "output differs on"),
        (look_alikes.ClampedLogits, "output differs on"),
        (look_alikes.RoundedWeights, "output differs on"),
        (look_alikes.LateCapacity, "output differs on"),
        (look_alikes.CapacityOfOneExpert, "output differs on"),
        (look_alikes.ClampedOutput, "tokens times 1000"),
        (look_alikes.Growing, "output differs on"),
        (look_alikes.WrongBeyond, "output differs on 1 x 200 tokens"),
        (look_alikes.OneTokenAlone, "output differs on 1 x 1 tokens"),
        (look_alikes.TokensMeet, "output differs on"),
        (look_alikes.OtherExpert, "output differs on 2 x 12 tokens"),
    ],
)
def test_what_nearly_is_what_it_is_described_to_be_is_refused(
    kind: type[look_alikes.LookAlike], words: str
) -> None:
    with pytest.raises(CaptureError) as raised:
        compiled(moec.describe(kind, **HINTS), kind())
    text = str(raised.value)
    assert f"a {kind.__name__} (look_alikes.py:" in text
    assert words in text


def test_a_look_alike_described_as_what_it_is_is_trusted() -> None:
    bound = {"threshold_on": "weight", "threshold": 0.02}
    result = compiled(
        moec.describe(look_alikes.Threshold, **HINTS, **bound), look_alikes.Threshold()
    )
    assert [(b.experts, b.top_k) for b in result.blocks] == [(4, 2)]


def test_a_forward_of_the_users_is_checked_and_then_captured() -> None:
    result = compiled(moec.describe(CountsInNumpy, forward=plain))
    assert len(result.blocks) == 1
    assert "was described by the user:" in result.captured.notes[0]
    with pytest.raises(CaptureError, match="output differs on 2 x 12 tokens, tokens times 1"):
        compiled(moec.describe(CountsInNumpy, forward=without_renormalising))


@pytest.mark.parametrize(
    ("kind", "description", "words"),
    [
        (CountsInNumpy, {"router": "gate"}, "the description lacks experts, top_k"),
        (CountsInNumpy, HINTS | {"score": "max"}, "score='max' is not one of softmax, sigmoid"),
        (CountsInNumpy, HINTS | {"colour": 1}, "'colour' is no part of a description; there are"),
        (CountsInNumpy, HINTS | {"router": "door"}, "router='door': CountsInNumpy has no such"),
        (CountsInNumpy, HINTS | {"experts": "door"}, "experts='door': CountsInNumpy has no such"),
        ("Other", HINTS, "Other is described, and the model has no module of that class"),
        (CountsInNumpy, HINTS | {"forward": plain}, "a forward, or names and numbers: not both"),
        (5, HINTS, "5 is no class of modules: give the class, or its name"),
        (dict, HINTS, "<class 'dict'> is no class of modules"),
        (CountsInNumpy, {"forward": 5}, "forward is 5: give a function of a module and its inputs"),
        (CountsInNumpy, HINTS | {"score": ["softmax"]}, "score=['softmax'] is not one of softmax"),
        (CountsInNumpy, HINTS | {"top_k": 0}, "top_k=0: give a whole number of at least 1"),
        (CountsInNumpy, HINTS | {"top_k": 2.0}, "top_k=2.0: give a whole number of at least 1"),
        (CountsInNumpy, HINTS | {"top_k": True}, "top_k=True: give a whole number"),
        (CountsInNumpy, HINTS | {"eps": "1e-6"}, "eps='1e-6': give a finite number (in YAML"),
        (CountsInNumpy, HINTS | {"scale": float("nan")}, "scale=nan: give a finite number"),
        (CountsInNumpy, HINTS | {"temperature": 0}, "temperature=0: give a number other than 0"),
        (CountsInNumpy, HINTS | {"renormalise": "no"}, "renormalise='no': give true or false"),
        (CountsInNumpy, HINTS | {"groups": 2}, "groups=2: give three whole numbers"),
        (CountsInNumpy, HINTS | {"threshold_on": "gap"}, "threshold_on='gap': give one of weight"),
        (CountsInNumpy, HINTS | {"capacity": 5}, "capacity=5: give a mapping"),
        (CountsInNumpy, HINTS | {"capacity": {"factor": "big"}}, "factor='big': give a number"),
        (CountsInNumpy, HINTS | {"capacity": {"per": "token"}}, "per='token': give one of"),
        (CountsInNumpy, HINTS | {"body": "gated"}, "body='gated': give a mapping"),
        (CountsInNumpy, HINTS | {"router": ""}, "router='': give the name of a part"),
        (CountsInNumpy, HINTS | {"experts": []}, "experts=[]: give the name of a part"),
        (CountsInNumpy, HINTS | {"shared": "door"}, "shared='door': CountsInNumpy has no such"),
        (CountsInNumpy, HINTS | {"shared": {"gate": "door"}}, "shared='door': CountsInNumpy"),
        (CountsInNumpy, HINTS | {"source": "door"}, "source='door': CountsInNumpy has no such"),
        (CountsInNumpy, HINTS | {"correction": "b"}, "correction='b': CountsInNumpy has no such"),
        (CountsInNumpy, HINTS | {"experts": "gate"}, "experts='gate' has no submodules"),
    ],
)
def test_what_is_no_description(kind: Any, description: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        compiled(moec.describe(kind, **description))
    assert words in str(raised.value)


def test_a_file_describes_classes_by_name(tmp_path: Path) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(
        "CountsInNumpy:\n  router: gate\n  experts: experts\n  top_k: 2\n  renormalise: true\n"
        "Other: {router: wg, experts: experts, top_k: 1}\n"
    )
    first, second = read_descriptions(file)
    assert first == moec.describe("CountsInNumpy", **HINTS)
    assert second == moec.describe("Other", router="wg", experts="experts", top_k=1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML"),
        ("- a", "write a class's name and, indented"),
        ("A: 3", "A: write what it does as name: value"),
        ("A:", "A: the description lacks router, experts, top_k"),
        ("A: {router: gate}", "A: the description lacks experts, top_k"),
    ],
)
def test_what_is_no_file_of_descriptions(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as raised:
        read_descriptions(file)
    assert words in str(raised.value)


def test_the_command_line_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "layer.py").write_text(
        "import torch\n"
        "from tests.capture.behaviour.modules import WIDTH, CountsInNumpy\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return CountsInNumpy().eval(), (torch.randn(2, 12, WIDTH),)\n"
    )
    file = tmp_path / "moe.yaml"
    words = ["inspect", f"{tmp_path / 'layer.py'}:make", "--describe", str(file)]
    file.write_text(
        "CountsInNumpy: {router: gate, experts: experts, top_k: 2, renormalise: true}\n"
    )
    right = CliRunner().invoke(front.cli, words, prog_name="moec")
    assert right.exit_code == 0, right.stderr
    text = " ".join(right.stdout.split())
    assert "1 MoE block" in text
    assert "was described by the user: experts=(experts.0, ..., experts.3)" in text
    file.write_text("CountsInNumpy: {router: gate, experts: experts, top_k: 1}\n")
    wrong = CliRunner().invoke(front.cli, words, prog_name="moec")
    assert wrong.exit_code == 1
    assert "is not what it is described to be: output differs on 2 x 12 tokens" in wrong.stderr
