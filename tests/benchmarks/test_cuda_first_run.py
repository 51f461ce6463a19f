"""The first run on a GPU, without a GPU: its steps run on the CPU here, and its checks claim the
kernels that they are compiled to."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from benchmarks.cuda import checks, first_run, layers
from benchmarks.cuda.checks import CHECKS, Check, Outcome
from benchmarks.cuda.shapes import LayerShape
from moec.codegen.backends.cuda.backend import CUDA
from moec.codegen.lower import lower
from moec.target import nvidia
from moec.target.cuda import TARGETS

SMALL = Check(
    partial(checks.layer, LayerShape(4, 2, 32, 32), torch.bfloat16, (1, 5)),
    ("dispatch", "combine"),
    near=2e-2,
    rows=0.05,
)
NOT_NAMED = {"size", "require_count", "require_index", "mixed", "append"}
"""Rules without a kernel; and what only `decode` has, which texts of models run: reports name the
kernels of main."""
NAMES = {
    **{"quantised": "int8", "compressed": "ternary", "sort": "dispatch"},
    **{"gate": "route", "add_norm": "add_rms_norm"},
}
"""Of rules whose kernels have other names in reports."""


def test_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CHECKS, "small", SMALL)
    first_run.main(["--dry-run", "--step", "check", "small"])
    report = json.loads(capsys.readouterr().out)
    assert report["calls"] == 2
    assert report["error"] <= SMALL.near
    assert "combine" in report["kernels"]
    needing = replace(SMALL, kernels=("route", "warp"))
    with pytest.raises(SystemExit, match="it does not use route, warp"):
        checks.outcome(needing, "cpu", "cpu")
    monkeypatch.setitem(CHECKS, "small", needing)
    assert first_run.step("check", "small", dry=True)["differing"] <= SMALL.rows
    monkeypatch.setitem(CHECKS, "small", replace(SMALL, near=0.0))
    with pytest.raises(SystemExit, match=r"the kernels are wrong: .*differing=1.0, calls=2"):
        first_run.step("check", "small", dry=True)
    assert first_run.step("check", "layer-ptx", dry=True) == {"left out": "it needs a GPU"}


def test_a_model_and_its_texts() -> None:
    """A prompt, and the logits of single tokens after it."""
    result = checks.outcome(replace(CHECKS["model-phimoe"], kernels=()), "cpu", "cpu")
    assert (result.calls, result.differing) == (6, 0)


def test_what_counts_as_wrong() -> None:
    expected, result = torch.ones(4, 8), torch.ones(4, 8)
    result[1, 3], result[2, 0] = torch.nan, 1.5
    (outcome := Outcome()).compare(result, expected, 1e-2)
    assert (outcome.differing, outcome.error) == (0.5, torch.inf)


def test_the_file_has_every_step_although_some_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, right = tmp_path / "run.json", {"error": 1e-3, "seconds": 2.5}

    def run(what: str, name: str, options: Any, seconds: float) -> dict[str, Any]:
        return {"failed": "exit code 1: wrong"} if name == "layer-tf32" else right

    words = ["--dry-run", "--only", "layer-bf16,layer-tf32", "-o", str(path)]
    with pytest.raises(SystemExit):
        first_run.main(words, run)
    report = json.loads(path.read_text())
    assert report["check"] == {"layer-bf16": right, "layer-tf32": run("", "layer-tf32", None, 0)}
    assert report["dry"]
    assert report["versions"]["torch"] == str(torch.__version__)
    assert capsys.readouterr().out.splitlines() == [
        "check layer-bf16: right, error 1.0e-03 of the greatest, 2.5 s",
        "check layer-tf32: failed: exit code 1: wrong",
        f"1 of 2 checks failed; send {path} in an issue",
    ]
    with pytest.raises(SystemExit, match="there is no check 'x': the checks are layer-bf16"):
        first_run.main(["--dry-run", "--only", "x"], run)


def test_times_are_left_out_when_the_minutes_are_over() -> None:
    def run(what: str, name: str, options: Any, seconds: float) -> dict[str, Any]:
        return {"rows": [], "limit": seconds > 60}

    for minutes, expected in ((10, {"rows": [], "limit": True}), (0, {"left out": "time"})):
        options = first_run.parsed(["--minutes", str(minutes)])
        (check, *times) = first_run.steps(options, ["layer-bf16"], run)
        assert check[0] == "check"
        assert [report for _, _, report in times] == [expected] * len(first_run.LAYERS)


def test_a_step_that_never_ends_or_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))
    program.touch(mode=0o755)
    options = first_run.parsed(["--dry-run"])
    for code, seconds, words in (
        ("exec sleep 9", 0.3, {"failed": "no end after 0 s"}),
        ("echo first >&2; echo last >&2; exit 3", 9, {"failed": "exit code 3: last"}),
        ("echo '{\"words\": \"'$3 $4 $5 $6'\"}'", 9, {"words": "--step check layer-x --dry-run"}),
    ):
        program.write_text(f"#!/bin/sh\n{code}\n")
        report = first_run.child("check", "layer-x", options, seconds)
        assert {key: report[key] for key in words} == words


def test_without_a_gpu_it_says_so() -> None:
    if nvidia.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(
        SystemExit, match=r"no NVIDIA driver here .*; --dry-run tries it on this CPU"
    ):
        first_run.main([])


def test_vllm_is_a_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the arguments that vLLM's function has."""
    from types import ModuleType

    def fused_experts(
        hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any
    ) -> torch.Tensor:
        gate, up = torch.einsum("td,tkhd->tkh", hidden_states, w1[topk_ids]).chunk(2, -1)
        rows = torch.einsum("tkh,tkdh->tkd", torch.nn.functional.silu(gate) * up, w2[topk_ids])
        return (rows * topk_weights[..., None]).sum(1)

    module = ModuleType("vllm.model_executor.layers.fused_moe")
    module.fused_experts = fused_experts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    block, (call,) = checks.layer(LayerShape(4, 2, 32, 32), torch.bfloat16, [5])
    assert (
        layers.difference(
            layers.vllm_products(block, call["hidden_states"]),
            block,
            **{"x": call["hidden_states"]},
        )
        == 0
    )


def test_every_kernel_is_claimed_by_a_check() -> None:
    claimed = {kernel for check in CHECKS.values() for kernel in check.kernels}
    rules = {rule.name for rule in CUDA.rules} - NOT_NAMED
    assert {NAMES.get(name, name) for name in rules} <= claimed


@pytest.mark.parametrize("name", CHECKS)
def test_checks_use_the_kernels_that_they_claim(name: str) -> None:
    check = CHECKS[name]
    module, calls = check.make()
    options = {"kwargs": calls[0], "verify": False, "build": False, **check.options()}
    compiled = moec.compile(module, target="cuda:sm_80", **options)
    kernels = {kernel for _, kernel in lower(compiled.module, TARGETS["cuda:sm_80"], CUDA).kernels}
    assert set(check.kernels) <= kernels
