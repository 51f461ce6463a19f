"""Experts in few bits, from moec.compile to the artifact and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.check import check
from moec.errors import UnsupportedError, UsageError, VerificationError
from moec.passes.quantise_experts import QuantiseExperts
from moec.passes.runner import Log
from moec.report import Report
from moec.runtime import artifact
from moec.runtime.executor import Executor
from moec.runtime.rebuild import rebuild
from tests.capture.modules import WIDTH, Moe

x = torch.randn(5, WIDTH)


@pytest.fixture(scope="module")
def compiled() -> moec.CompiledModel:
    return moec.compile(Moe(), (x,), quant="int4")


def test_the_report_says_what_it_cost(compiled: moec.CompiledModel) -> None:
    report = compiled.report()
    (line,) = report.quantised
    assert (line.format, line.covered) == ("int4", line.experts)
    assert line.bytes_after < line.bytes_before / 4
    assert 0.02 < line.error <= line.worst_expert < 0.2
    (moved,) = report.moved
    assert 0.01 < moved.error < 0.5
    assert moved.rows == sum(len(c) for c in (x, x, x[:1])) + 19
    (checked,) = report.verification
    assert checked.error < 1e-5  # of what the quantised graph means
    assert Report.of_dict(report.to_dict()) == report
    words = str(report)
    assert "Checked against the quantised graph" in words
    assert "Against the unquantised model" in words
    assert f"{line.experts} of {line.experts}" in words


def test_saved_loaded_and_rebuilt(compiled: moec.CompiledModel, tmp_path: Any) -> None:
    compiled.save(tmp_path / "m.moec")
    wanted = compiled(x)
    assert torch.equal(moec.load(tmp_path / "m.moec")(x), wanted)
    again = Executor(rebuild(artifact.read(tmp_path / "m.moec")))
    (made,) = again({"x": x}).values()
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("text", ["int8", "int8:asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_level_runs_it(text: str, dtype: torch.dtype) -> None:
    made = moec.compile(Moe(dtype), (x.to(dtype),), quant=text, opt_level=0)
    assert made.checked is not None
    assert made.checked.moved[0].error < 0.02


def test_wrong_formats_are_refused_before_anything_slow() -> None:
    with pytest.raises(UsageError, match="'int5' is no format"):
        moec.compile(None, quant="int5")
    with pytest.raises(UsageError, match="quant is a int: write int8"):
        moec.compile(None, quant=8)  # type: ignore[arg-type]


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="no experts were recognised in the model"):
        moec.compile(nn.Linear(8, 8), (torch.randn(2, 8),), quant="int8")
    with pytest.raises(UnsupportedError, match=f"blocks of 128 do not divide the {WIDTH} weights"):
        moec.compile(Moe(), (x,), quant="int4:128")


def test_wrong_code_is_found(compiled: moec.CompiledModel, monkeypatch: Any) -> None:
    """A fiftieth is far less than int4 changes, and more than the kernels may."""

    def wrong(inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert compiled.executor is not None
        return {n: v * 1.02 for n, v in compiled.executor(inputs).items()}

    with pytest.raises(VerificationError, match=r"by 2\.0e-02 of .*code is wrong"):
        check(compiled.captured, wrong, compiled.steps)


def test_a_wrong_exact_pass_is_still_named(monkeypatch: Any) -> None:
    """Rounding of weights hides nothing: the graph before it is compared with eager."""
    from tests.api.test_verification import broken_gate

    broken_gate.__wrapped__(monkeypatch)  # type: ignore[attr-defined]
    with pytest.raises(VerificationError, match="the graph differs is fuse-gate"):
        moec.compile(Moe(), (x,), quant="int8")


def test_an_expert_that_was_left_out_is_counted(monkeypatch: Any) -> None:
    right = QuantiseExperts.run

    def wrong(self: QuantiseExperts, program: Any, log: Log) -> Any:
        made = right(self, program, log)
        for name, tensor in made.weights.items():
            if name.endswith(".codes"):
                tensor[1] = 8
        return made

    monkeypatch.setattr(QuantiseExperts, "run", wrong)
    made = moec.compile(Moe(), (x,), quant="int4", build=False)
    (line,) = made.quantised
    assert (line.covered, line.experts - line.covered) == (line.experts - 1, 1)
    assert line.worst_expert == pytest.approx(1.0)
