"""The benchmark script for GPUs, without a GPU; its measurements run on the CPU here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda as script
from moec.codegen.cuda.roofline import LayerShape
from moec.target import nvidia
from moec.target.cuda import TARGETS

TINY = LayerShape(4, 2, 32, 32)


def test_a_dry_run_lists_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--dry-run", "--layers", "granite-1b-a400m,olmoe-1b-7b", "--tokens", "1,4096"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "numbers  granite-1b-a400m   T = 1",
        "numbers  olmoe-1b-7b        T = 1",
        "faults   memcheck           T = 1, 16",
        "faults   racecheck          T = 1, 16",
    ]
    assert lines[4] == "text     granite-1b-a400m   T = 1"
    assert lines[6] == "times    granite-1b-a400m   T = 1, 4096"
    assert lines[8] == "codes    granite-1b-a400m   T = 1, 4096"
    assert lines[10].startswith("10 steps; times beside eager, grouped_mm, inductor, cublas")
    assert lines[11] == "experts of few bits: int8, int4:32, mxfp4"


def test_without_a_gpu_it_says_so() -> None:
    if nvidia.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(SystemExit, match=r"and there is no NVIDIA driver here .*; --dry-run"):
        script.main([])


def test_an_unknown_layer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--layers", "gpt-5"])
    assert "there is no layer 'gpt-5': give some of olmoe-1b-7b" in capsys.readouterr().err


def test_numbers_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROUNDS", 1)
    (line,) = script.numbers(TINY, [5], "cpu", "cpu")
    assert line.startswith("T = 5: ")
    assert "0.0% of rows differ from grouped_mm" in line
    names = ("moec", "eager", "cublas")
    (row,) = script.times(TINY, [5], "cpu", "cpu", TARGETS["cuda:sm_80"], names)
    assert list(row) == ["tokens", *names, "limit"]


def test_experts_of_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROUNDS", 1)
    (row,) = script.few_bits(TINY, [5], "cpu", "cpu", ["int4:32"])
    assert list(row) == ["tokens", "int4:32"]
    monkeypatch.setattr(script, "difference", lambda *_: 0.5)
    with pytest.raises(
        SystemExit, match=r"the kernels of int4:32 are wrong: 50\.0% of rows differ"
    ):
        list(script.few_bits(TINY, [5], "cpu", "cpu", ["int4:32"]))


def test_times_are_recorded_although_a_step_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA: out of memory")

    monkeypatch.setattr(script, "lacking", lambda: "")
    monkeypatch.setattr(script.cuda, "parse", lambda name: TARGETS["cuda:sm_90a"])
    monkeypatch.setattr(script, "numbers", fail)
    monkeypatch.setattr(script, "times", lambda *_: iter([{"tokens": 1, "moec": 2.5}]))
    monkeypatch.setattr(script, "few_bits", lambda *_: iter([{"tokens": 1, "int8": 1.5}]))
    record = tmp_path / "cuda.jsonl"
    words = ["--layers", "olmoe-1b-7b", "--tokens", "1", "--only", "numbers,times,codes"]
    script.main([*words, "--record", str(record)])
    assert "failed: RuntimeError: CUDA: out of memory" in capsys.readouterr().out
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(entry["claim"], entry["case"]) for entry in entries] == [
        ("cuda-layers", "bf16"),
        ("cuda-layers", "few bits"),
    ]
    assert entries[0]["rows"] == [{"layer": "olmoe-1b-7b", "tokens": 1, "moec": 2.5}]


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "transformers" in script.text(TINY, "cpu", "cpu", new=2)
    wrong = SimpleNamespace(generate=lambda ids, **options: ids)
    monkeypatch.setattr("moec.compile", lambda *_, **options: wrong)
    with pytest.raises(SystemExit, match="the tokens differ from those of transformers"):
        script.text(TINY, "cpu", "cpu", new=2)


def test_wrong_kernels_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (script.block(TINY), torch.zeros_like)
    monkeypatch.setattr(script, "subject", lambda *_: wrong)
    with pytest.raises(SystemExit, match="the kernels are wrong"):
        list(script.numbers(TINY, [5], "cpu", "cpu"))


def test_compute_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.faults("memcheck", (1,), "cuda:0").startswith("left out: there is no compute-s")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors of $2"\n')
    tool.chmod(0o755)
    assert script.faults("memcheck", (1,), "cuda:0") == "ERROR SUMMARY: 0 errors of memcheck"
