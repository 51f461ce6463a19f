"""Where weights stay in files, eager is evaluated layer by layer for all inputs, and finds as much
as eager for one input after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.capture import capture
from moec.errors import UsageError, VerificationError
from moec.model.compiled import CompiledModel
from moec.sources.memory.memory import Bounded
from moec.sources.memory.ranges import AddressRange
from moec.verify.check import check
from tests.capture.modules import WIDTH, Moe
from tests.command_line import invoke
from tests.sources.checkpoint.families import model
from tests.sources.memory.small import SMALL, count_weights_alone
from tests.verify.test_check import break_gates


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    count_weights_alone(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model("mixtral").save_pretrained(folder)
    return folder


class Reads:
    """The bytes of weights that a verification reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.verifying = 0, False
        provide = AddressRange.provide

        def count(region: AddressRange) -> None:
            self.bytes += region.size if self.verifying else 0
            provide(region)

        monkeypatch.setattr(AddressRange, "provide", count)

    def progress(self, phase: str) -> None:
        self.verifying = phase == "verify"


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"dtype": "float32"}, 7), ({}, 8), ({"quant": "int8"}, 8)],
    ids=["float32", "bf16", "int8"],
)
def test_the_numbers_are_those_of_the_whole_model_in_few_passes(
    options: dict[str, str], passes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager, the graph, and the graph with the choices of the code once each, and the graph of
    `decode` once for each of two pieces; in 16 bits also the graph as it is; with codes also the
    graph before them. (Where other right results are needed, they are one pass more each.)"""
    options = {"dtype": "bfloat16"} | options
    checked, count = {}, {}
    for verify in ("layers", "whole"):
        reads = Reads(monkeypatch)
        compiled = moec.compile(
            folder, **options, memory=SMALL, verify=verify, progress=reads.progress
        )
        assert compiled.report().verified == verify
        checked[verify], count[verify] = compiled.checked, reads.bytes / size_of(compiled)
    assert replace(checked["layers"], layers=False) == checked["whole"]
    assert count["layers"] < passes + 0.5
    assert count["whole"] > count["layers"] + 3


def size_of(compiled: CompiledModel) -> int:
    return sum(weight.nbytes for weight in compiled.source.model.parameters())


def test_it_is_the_default_where_weights_stay_in_files(folder: Path) -> None:
    report = moec.compile(folder, memory=SMALL, kv_cache=False).report()
    assert report.verified == report.to_dict()["verified"] == "layers"
    assert "eager ran layer by layer" in str(report)
    assert moec.compile(folder, kv_cache=False).report().verified == "whole"
    off = moec.compile(folder, memory=SMALL, kv_cache=False, verify="off")
    assert (off.checked, off.report().verified) == (None, "off")


def test_what_verify_takes() -> None:
    with pytest.raises(UsageError, match=r"verify is 'layer': give .off., .quick., "):
        moec.compile(Moe(), (torch.randn(5, WIDTH),), verify="layer")
    assert moec.compile(Moe(), (torch.randn(5, WIDTH),), verify="whole").checked is not None


def test_the_option_of_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.moec"
    words = ["compile", folder, "-o", out, "--no-kv-cache", "--memory", "0.03125MiB", "--json"]

    def run(*more: str) -> Any:
        return invoke(*words, *more)

    assert '"verified": "whole"' in run("--verify", "whole").stdout
    assert '"verified": "layers"' in run("--verify", "0.5", "--force").stdout
    assert "layers" in invoke("compile", "--help").stdout


def test_a_wrong_pass_of_one_layer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gates(monkeypatch, slice(-1, None))
    with pytest.raises(VerificationError, match=r"^logits .* the graph differs is fuse-gate"):
        moec.compile(folder, memory=SMALL, verify="layers", kv_cache=False)


@pytest.mark.parametrize(
    ("options", "number"), [({"dtype": "float32"}, -1), ({"quant": "int8"}, 0)], ids=str
)
def test_a_wrong_packed_weight_of_one_layer_is_found(
    options: dict[str, str], number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows of one stack of experts are those of others."""
    right, stacks = Bounded.array, []

    def wrong(self: Bounded, array: Any) -> Any:
        stored = right(self, array)
        if stored.ndim > 2 and stored.shape[0] == 4:
            stacks.append(stored)
        return stored

    def swap(phase: str) -> None:
        if phase == "load":
            stack = stacks[number]
            stack[:2] = stack[2:].copy()

    monkeypatch.setattr(Bounded, "array", wrong)
    with pytest.raises(VerificationError, match=r"kernel \w+ computes .* wrong"):
        moec.compile(
            folder, **options, memory=SMALL, verify="layers", kv_cache=False, progress=swap
        )
    assert len(stacks) > 1


def test_a_refusal_counts_where_inputs_are_evaluated_alone_too() -> None:
    """A module that is disturbed by taking turns is no error of the code."""
    captured, others = capture(Moe(), (torch.randn(5, WIDTH),)), 0

    def eager(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (result,) = captured.eager(x)
        return (result * (1 + others),)

    def run(inputs: Any) -> dict[str, torch.Tensor]:
        return {"output": captured.eager(*inputs.values())[0]}

    def together(evaluations: Sequence[Callable[[], Any]]) -> list[Any]:
        nonlocal others
        others = len(evaluations) - 1
        try:
            return [evaluation() for evaluation in evaluations]
        finally:
            others = 0

    checked = check(replace(captured, eager=eager), run, (), together=together)
    assert not checked.layers
    assert "for one input after the other" in checked.notes[-1]
    assert checked.errors["output"] < 1e-6
