"""`moec run` as a user sees it: its output, its exit codes, and the files it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.commands.run import command
from moec.errors import InputError, UsageError, VerificationError
from moec.runtime.artifact import artifact
from moec.runtime.artifact.artifact import Sample
from moec.runtime.package import Package
from tests.runtime import toy


def run(*words: Any) -> None:
    command.main([str(word) for word in words], standalone_mode=False)


def moec(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moec", "run", *map(str, words)], capture_output=True, text=True
    )


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    np.savez(path := tmp_path / "x.npz", **toy.inputs())
    return path


def test_outputs_to_a_file(
    original: Path, package: Package, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = inputs.with_name("y.npz")
    run(original, "--input", inputs, "--output", output)
    assert capsys.readouterr().out == "y: f32[3, 3]\ntop: f32[3, 2]\nlow: bf16[3, 3]\n"
    with np.load(output) as result:
        np.testing.assert_allclose(result["y"], toy.expected(package, toy.inputs()), atol=5e-6)


def test_json(original: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(original, "--input", inputs, "--check", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["outputs"]["low"] == {"dtype": "bf16", "shape": [3, 3]}
    assert report["check"]["samples"] == 1
    assert report["check"]["difference"] <= report["check"]["tolerance"] == 1e-5


def test_quiet(original: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(original, "--input", inputs, "--check", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_check_agrees(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(original, "--check")
    assert capsys.readouterr().out.startswith("1 sample agrees: greatest difference ")


def test_check_differs(package: Package, tmp_path: Path) -> None:
    sample = toy.sample(package)
    wrong = Sample(sample.inputs, {**sample.outputs, "y": sample.outputs["y"] + 1})
    path = tmp_path / "wrong.moec"
    artifact.write(package, path, graphs={"main": ""}, samples=[sample, wrong], tolerance=1e-5)
    with pytest.raises(VerificationError, match="output 'y' of sample 1 differs by"):
        run(path, "--check")
    assert VerificationError.exit_code == 4


@pytest.mark.parametrize("at", [(0, 0), (-1, -1)])
def test_a_sample_with_nan_differs_from_itself(
    package: Package, tmp_path: Path, at: tuple[int, int]
) -> None:
    y = toy.sample(package).outputs["y"].copy()
    y[at] = np.nan
    path, broken = tmp_path / "nan.moec", Sample({**toy.inputs()}, {"y": y})
    artifact.write(package, path, graphs={"main": ""}, samples=[broken], tolerance=1e-5)
    with pytest.raises(VerificationError, match=r"0 differs by inf \(inf: also for NaN\)"):
        run(path, "--check")


def test_check_without_samples(package: Package, tmp_path: Path) -> None:
    artifact.write(package, path := tmp_path / "bare.moec", graphs={"main": ""})
    with pytest.raises(UsageError, match="has no samples to check against; use --input"):
        run(path, "--check")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --input FILE"),
        (["--input", "a.npz", "--prompt", "b"], "--input and --prompt cannot be combined"),
        (["--check", "--output", "y.npz"], "--output needs --input"),
        (["--input", "a.pt"], r"a\.pt: the file type must be one of \.npz"),
        (["--input", "a.npz", "--output", "y.txt"], r"y\.txt: the file type must be one of \.npz"),
    ],
)
def test_usage(original: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(original, *words)


def test_wrong_input_leaves_no_output(original: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **toy.inputs() | {"ids": np.array([0, 5, 1])})
    with pytest.raises(
        InputError, match=r"'ids' holds 5 at \[1\], and its values must be from 0 to"
    ):
        run(original, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_nan_is_refused(package: Package, original: Path, tmp_path: Path) -> None:
    arguments = toy.inputs()
    arguments["x"][1, 2] = np.nan
    np.savez(source := tmp_path / "x.npz", **arguments)
    with pytest.raises(InputError, match=r"input 'x' contains NaN, first at \[1, 2\]"):
        run(original, "--input", source, "--output", tmp_path / "y.npz")

    arrays = {**package.arrays, "b": np.full(3, np.nan, np.float32)}
    artifact.write(
        replace(package, arrays=arrays), path := tmp_path / "nan.moec", graphs={"main": ""}
    )
    np.savez(source, **toy.inputs())
    with pytest.raises(InputError, match=r"output 'y' contains NaN, first at \[0, 0\]"):
        run(path, "--input", source, "--output", tmp_path / "y.npz")
    assert not (tmp_path / "y.npz").exists()


def test_a_prompt(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(speaker, "--prompt", "b c", "--max-new-tokens", "3")
    out, err = capsys.readouterr()
    assert out == " d e f\n"
    slow, speed = err.splitlines()
    assert slow == (
        "slow: each new token processes the whole text again, as there is no KV cache: the model "
        "was compiled without a KV cache"
    )
    assert speed.startswith("2 tokens read in ")
    assert speed.endswith(" tokens/s")
    run(speaker, "--prompt", "b c", "--max-new-tokens", "1")
    assert capsys.readouterr().err.splitlines()[-1].endswith(" s, then 1 token")


def test_options_of_a_prompt(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ("--prompt", "b c", "--temperature", "30", "--seed", "1", "--quiet")
    run(speaker, *drawn)
    first = capsys.readouterr()
    run(speaker, *drawn)
    assert capsys.readouterr() == first
    assert first.err == ""
    with pytest.raises(UsageError, match=r"temperature is -1\.0; it must be 0 or more"):
        run(speaker, "--prompt", "b c", "--temperature", "-1")


def test_a_prompt_as_json(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(speaker, "--prompt", "b c", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == " d e f g"
    assert report["tokens"] == [3, 4, 5, 6]  # 7 ends the text
    assert report["prompt_tokens"] == 2


def test_a_prompt_that_fills_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speaker.moec"
    files = toy.tokenizer_files(stop=None)
    artifact.write(toy.language_model(longest=4), path, graphs={"main": ""}, files=files)
    run(path, "--prompt", "b c")
    out, err = capsys.readouterr()
    assert out == " d e f\n"
    assert err.rstrip().endswith("the model takes no more than 4 tokens")


def test_a_process_without_torch_and_without_the_compiler(
    original: Path, speaker: Path, inputs: Path
) -> None:
    script = f"""
import sys
from moec.__main__ import cli
for words in (["run", {str(original)!r}, "--check", "-i", {str(inputs)!r}],
              ["run", {str(speaker)!r}, "--prompt", "b c"]):
    cli.main(words, standalone_mode=False)
print(sorted({{"torch", "tvm", "sympy", "transformers", "rich"}} & sys.modules.keys()))
print("libtvm_compiler" in open("/proc/self/maps").read())
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-3:] == [" d e f g", "[]", "False"]


def test_exit_codes_and_one_line_for_each_mistake(
    saved: Path, inputs: Path, package: Package, tmp_path: Path
) -> None:
    done = moec(saved, "--input", inputs, "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    missing = moec(tmp_path / "none.moec", "--check")
    assert missing.returncode == 1
    assert missing.stderr == f"error: {tmp_path / 'none.moec'}: there is no such file\n"

    content = saved.read_bytes()
    saved.write_bytes(content[:-1000])
    damaged = moec(saved, "--input", inputs, "--output", tmp_path / "y.npz")
    assert damaged.returncode == 1
    assert "is truncated or damaged" in damaged.stderr
    assert damaged.stderr.count("\n") == 1
    assert not (tmp_path / "y.npz").exists()

    wrong = Sample(toy.inputs(), {"y": np.zeros((3, 3), np.float32)})
    artifact.write(package, saved, graphs={"main": ""}, samples=[wrong], tolerance=1e-5)
    differs = moec(saved, "--check")
    assert differs.returncode == 4
    assert "differs by" in differs.stderr
