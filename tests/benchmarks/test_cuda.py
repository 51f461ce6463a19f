"""The benchmark script for GPUs, without a GPU; its measurements run on the CPU here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.cuda import __main__ as script
from benchmarks.cuda import contenders, layers, models
from benchmarks.cuda.shapes import LayerShape
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
    assert lines[10] == "models   granite-1b-a400m   T = 512"
    words = "12 steps; times beside eager, grouped_mm, triton, inductor, cublas"
    assert lines[12].startswith(words)
    assert lines[13] == "experts of few bits: int8, int4:32, fp8:128, mxfp4"


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
    monkeypatch.setattr(layers, "ROUNDS", 1)
    (line,) = layers.numbers(TINY, [5], "cpu", "cpu")
    assert line.startswith("T = 5: ")
    assert "0.0% of rows differ from grouped_mm" in line
    names = ("moec", "eager", "cublas")
    (row,) = layers.times(TINY, [5], "cpu", "cpu", names)
    assert list(row) == ["tokens", *names]


def test_experts_of_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "ROUNDS", 1)
    (row,) = layers.few_bits(TINY, [5], "cpu", "cpu", ["int4:32"])
    assert list(row) == ["tokens", "int4:32"]
    monkeypatch.setattr(layers, "difference", lambda *_: 0.5)
    with pytest.raises(
        SystemExit, match=r"the kernels of int4:32 are wrong: 50\.0% of rows differ"
    ):
        list(layers.few_bits(TINY, [5], "cpu", "cpu", ["int4:32"]))


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


def test_a_contender_that_is_not_installed_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layers, "ROUNDS", 1)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "benchmarks.cuda.grouped_triton", raising=False)
    (row,) = layers.times(TINY, [2], "cpu", "cpu", ("triton", "eager"))
    assert list(row) == ["tokens", "eager"]
    assert "  triton failed: " in capsys.readouterr().out


def test_the_products_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, in float32: it has no bf16. Rows of all tiles, tails of width."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    module = contenders.block(LayerShape(8, 2, 96, 80)).float()
    for count in (1, 70):
        runs = contenders.triton_products(module, x := torch.randn(1, count, 96))
        for run in runs.values():
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-6)


def test_compile_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each format of a layer, and a model of one layer."""
    targets = []

    def compiled(model: torch.nn.Module, *_: object, **options: object) -> object:
        targets.append((options["target"], options.get("quant")))
        if options.get("quant") == "mxfp4":
            raise ValueError("a kernel spills")
        gpu = SimpleNamespace(launches={"sm_90a": (1, 2)}, parts={"sm_90a.cubin": b"12345"})
        return SimpleNamespace(package=SimpleNamespace(gpu=gpu))

    monkeypatch.setattr("moec.compile", compiled)
    monkeypatch.setattr(script, "build", lambda name, **sizes: models_of_one_layer(sizes))
    monkeypatch.setitem(script.LAYERS, "olmoe-1b-7b", TINY)
    with pytest.raises(SystemExit, match="1 compilations failed"):
        script.main(["--compile-only", "--layers", "olmoe-1b-7b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("olmoe-1b-7b bf16: 2 kernels, 0 kB, ")
    assert lines[4] == "olmoe-1b-7b mxfp4: failed: ValueError: a kernel spills"
    assert lines[5].startswith("olmoe-1b-7b model: 2 kernels")
    formats = [None, *layers.FORMATS, None]
    assert targets == [("cuda:sm_90a", format) for format in formats]


def models_of_one_layer(sizes: dict[str, object]) -> object:
    assert sizes == {"num_hidden_layers": 1}
    return SimpleNamespace(config=SimpleNamespace(vocab_size=64))


SMALL: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def test_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both families build in bf16; a prompt and a token of one of them are timed."""
    monkeypatch.setattr(layers, "ROUNDS", 1)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    for name, (family, config) in models.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, (family, config | SMALL))
        model = models.build(name, num_hidden_layers=1)
        assert model.dtype == torch.bfloat16
    run = MagicMock(side_effect=lambda ids: model(ids).logits)
    prompt, token = models.whole(model, run, "cpu", prompt=5, new=2)
    assert list(prompt) == ["case", "differing", "moec", "eager", "inductor"]
    assert (prompt["case"], prompt["differing"]) == ("prompt of 5", 0.0)
    assert list(token) == ["case", "moec", "eager"]
    assert run.generate.call_args.kwargs == {"max_new_tokens": 2, "stop": ()}
    with pytest.raises(SystemExit, match=r"the kernels are wrong: 100\.0% of the logits' rows"):
        list(models.whole(model, lambda ids: torch.zeros(1, 5, 64), "cpu", prompt=5))


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "transformers" in models.text(TINY, "cpu", "cpu", new=2)
    wrong = SimpleNamespace(generate=lambda ids, **options: ids)
    monkeypatch.setattr("moec.compile", lambda *_, **options: wrong)
    with pytest.raises(SystemExit, match="the tokens differ from those of transformers"):
        models.text(TINY, "cpu", "cpu", new=2)


def test_wrong_kernels_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (contenders.block(TINY), torch.zeros_like)
    monkeypatch.setattr(layers, "subject", lambda *_: wrong)
    with pytest.raises(SystemExit, match="the kernels are wrong"):
        list(layers.numbers(TINY, [5], "cpu", "cpu"))


def test_compute_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.faults("memcheck", (1,), "cuda:0").startswith("left out: there is no compute-s")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors of $2"\n')
    tool.chmod(0o755)
    assert script.faults("memcheck", (1,), "cuda:0") == "ERROR SUMMARY: 0 errors of memcheck"
