"""tune=True: from measurements to the artifact, its report, and code rebuilt from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.codegen import module_builder
from moec.codegen.tuning import measure as measuring
from moec.codegen.tuning.tunable import Tunable, Values
from moec.errors import ArtifactError, UsageError
from moec.model.rebuild import rebuild
from moec.report.opened import open_artifact
from moec.report.report import Report
from moec.runtime.artifact import artifact
from moec.runtime.call.executor import Executor
from moec.target.cpu import TARGETS
from tests.capture.modules import WIDTH, Moe

x = torch.randn(5, WIDTH)


def fast_without_fetching(self: measuring.OnThisMachine, kernel: Tunable) -> measuring.Bench:
    def bench(tunings: Sequence[Values]) -> measuring.Times:
        seconds = [[0.8 if t["fetched"] == 0 else 1.0] * 9 for t in tunings]
        return {tokens: seconds for tokens in measuring.TOKENS}

    return bench


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> moec.CompiledModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CACHE", str(tmp_path_factory.mktemp("cache") / "own"))
        patch.setattr(measuring.OnThisMachine, "__call__", fast_without_fetching)
        phases: list[str] = []
        model = moec.compile(Moe(), (x,), tune=True, progress=phases.append)
        assert [p.partition(" ")[0] for p in phases].index("tune") < phases.index("kernels")
        return model


def test_the_report_says_what_was_chosen_and_what_it_gains(compiled: moec.CompiledModel) -> None:
    report = compiled.report()
    assert {line.values["fetched"] for line in report.tuned} == {0}
    assert all(gain == pytest.approx(1.25) for line in report.tuned for gain in line.gains.values())
    assert Report.of_dict(report.to_dict()) == report
    words = " ".join(str(report).split())
    assert "tuned kernel" in words
    assert "fetched 0" in words
    assert "1: 1.25, 8: 1.25, 64: 1.25, 512: 1.25 (± 0%)" in words
    assert "tune" in report.phases


def test_saved_inspected_and_rebuilt(
    compiled: moec.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compiled(x)
    compiled.save(path := tmp_path / "tuned.moec", native=False)
    result = open_artifact(path).report()
    assert result.tuned == compiled.report().tuned
    opened = artifact.read(path, native=False)
    assert compiled.package is not None
    assert opened.package.tunings == compiled.package.tunings
    assert all(values["fetched"] == 0 for values in opened.package.tunings.values())
    results: list[Values] = []
    tuned = module_builder.Lowering.tuned

    def spied(self: module_builder.Lowering, kernel: Tunable, name: str) -> object:
        def make(name: str, values: Values) -> object:
            results.append(values)
            return kernel.make(name, values)

        return tuned(self, replace(kernel, make=make), name)  # type: ignore[arg-type]

    monkeypatch.setattr(module_builder.Lowering, "tuned", spied)
    again = Executor(rebuild(opened))
    assert results
    assert all(values["fetched"] == 0 for values in results)
    (name,) = (port.name for port in compiled.package.main.inputs)
    (inputs,) = again({name: x.numpy()}).values()
    assert torch.equal(torch.as_tensor(inputs), expected)


@pytest.mark.parametrize(
    ("tunings", "words"),
    [
        (
            {"some kernel": {"fetched": 0}},
            ("was tuned for kernels that this version of moec generates differently"),
        ),
        ({"": {"speed": 0}}, "was tuned by another version of moec: there is no value 'speed'"),
    ],
)
def test_an_artifact_that_was_tuned_by_another_moec(
    compiled: moec.CompiledModel, tmp_path: Path, tunings: dict[str, dict[str, int]], words: str
) -> None:
    package = compiled._package()
    (kernel, *_) = package.tunings
    tunings = {name or kernel: values for name, values in tunings.items()}
    other = replace(compiled, package=replace(package, tunings=tunings))
    other.save(path := tmp_path / "other.moec", native=False)
    with pytest.raises(ArtifactError, match=words):
        rebuild(artifact.read(path, native=False))


def test_refused_where_nothing_can_be_measured() -> None:
    with pytest.raises(
        UsageError, match="--tune measures kernels on the machine that will run them, and this"
    ):
        moec.compile(Moe(), (x,), tune=True, target=TARGETS["neon-dotprod"])
    for how in ({"build": False}, {"stop_after": "fuse-gate"}):
        with pytest.raises(UsageError, match="this command builds none: leave --tune out"):
            moec.compile(Moe(), (x,), tune=True, **how)  # type: ignore[arg-type]
