"""`moec run --rebuild`: the recompiled stored graph reads the stored, packed weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.codegen.package import build
from moec.errors import ArtifactError, VerificationError
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.model.rebuild import rebuild
from moec.runtime.artifact import artifact
from moec.runtime.artifact.artifact import Sample
from moec.runtime.call.executor import Executor
from moec.runtime.package import Package, Port
from moec.target import cpu as target
from tests.runtime.call.test_run import run

GRAPH = """graph main(x: f32[T, 16]; w: f32[24, 16], b: f32[24]) {
  size T in [0, 64]
  h: f32[T, 24] = aten.linear.default(x, w, b) @ layer
  y: f32[T, 24] = aten.silu.default(h) @ layer.act
  return y
}
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(24, 16, generator=generator),
        "b": torch.randn(24, generator=generator),
    }


@pytest.fixture(scope="module")
def compiled(weights: dict[str, torch.Tensor]) -> Package:
    return build(Module.of(Program(parse(GRAPH), weights)), target.parse("cpu"))


@pytest.fixture
def x() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)


def save(path: Path, package: Package, **how: Any) -> Path:
    artifact.write(package, path, **{"graphs": {"main": GRAPH}, **how})
    return path


def test_without_native_code(
    compiled: Package, weights: dict[str, torch.Tensor], x: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / "bare.moec", compiled, native=False)
    rebuilt = Executor(rebuild(artifact.read(path, native=False)))
    result = rebuilt({"x": x})["y"]
    np.testing.assert_array_equal(result, Executor(compiled)({"x": x})["y"])
    exact = torch.nn.functional.silu(
        torch.from_numpy(x).double() @ weights["w"].double().T + weights["b"].double()
    )
    # 17 terms of magnitude below 10, each rounded to 24 bits.
    np.testing.assert_allclose(result, exact, rtol=0, atol=17 * 10 * 2**-24)


def test_code_for_another_machine_or_tvm_does_not_matter(
    compiled: Package, x: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    path = save(
        tmp_path / "old.moec",
        replace(compiled, library=b"not code", versions={"tvm": "0.11.0"}),
        samples=[Sample({"x": x}, Executor(compiled)({"x": x}))],
        tolerance=1e-6,
    )
    with pytest.raises(ArtifactError, match="run it with --rebuild"):
        artifact.read(path)
    run(path, "--rebuild")


def test_rebuilt_code_must_agree_with_the_samples(
    compiled: Package, x: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    wrong = Sample({"x": x}, {"y": np.zeros((5, 24), np.float32)})
    path = save(tmp_path / "wrong.moec", compiled, samples=[wrong], tolerance=1e-6)
    with pytest.raises(VerificationError, match="output 'y' of sample 0 differs by"):
        run(path, "--rebuild")


def test_a_target_that_is_described_otherwise_now(compiled: Package, tmp_path: Path) -> None:
    target = replace(compiled.target, mattr=("+sse3",))
    path = save(tmp_path / "other.moec", replace(compiled, target=target))
    with pytest.raises(ArtifactError, match="that this version of moec defines differently"):
        run(path, "--rebuild")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("graph main(", "graphs/main.moec is malformed: line 1: "),
        (GRAPH.replace("  y: ", "  x: "), "graphs/main.moec is malformed: "),
        (GRAPH.replace("24", "99"), "describes the function 'main' differently from"),
        (
            GRAPH.replace(", b: f32[24]", "").replace("(x, w, b)", "(x, w)"),
            "has its weights in a layout of another version of moec",
        ),
    ],
)
def test_a_graph_that_is_not_the_weights(
    compiled: Package, tmp_path: Path, text: str, words: str
) -> None:
    path = save(tmp_path / "odd.moec", compiled, graphs={"main": text})
    with pytest.raises(ArtifactError, match=words):
        run(path, "--rebuild")


LOOKUP = """graph main(ids: i64[T]; table: f32[24, 16]) {
  size T in [0, 64]
  y: f32[T, 16] = aten.embedding.default(table, ids)
  return y
}
"""


@pytest.mark.parametrize(
    "altered",
    [
        {"index_ranges": {}},
        {"index_ranges": {"ids": (0, 1 << 40)}},
        {"sizes": {"T": (0, 1 << 40)}},
        {"outputs": (Port("y", "f32", ("T", 17)),)},
    ],
)
def test_a_manifest_that_allows_more_than_the_graph(
    tmp_path: Path, altered: dict[str, Any]
) -> None:
    """Inputs are checked by the manifest: new code would read rows that the table does not have."""
    program = Program(parse(LOOKUP), {"table": torch.randn(24, 16)})
    package = build(Module.of(program), target.parse("cpu"))
    forged = replace(package, functions={"main": replace(package.main, **altered)})
    path = save(tmp_path / "forged.moec", forged, graphs={"main": LOOKUP})
    with pytest.raises(ArtifactError, match=r"'main' differently from graphs/main\.moec"):
        run(path, "--rebuild")


def test_in_a_process_that_began_without_torch(compiled: Package, tmp_path: Path) -> None:
    path = save(tmp_path / "model.moec", compiled, native=False)
    np.savez(source := tmp_path / "x.npz", x=np.ones((2, 16), np.float32))
    words = [sys.executable, "-m", "moec", "run", str(path), "--rebuild", "--input", str(source)]
    process = subprocess.run(words, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "y: f32[2, 24]\n", "")
