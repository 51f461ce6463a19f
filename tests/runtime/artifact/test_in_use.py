"""Models in use while the process is forked, or while their file is overwritten or replaced."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.codegen.package import build
from moec.errors import ArtifactError, InputError, UsageError
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.runtime import checks
from moec.runtime.artifact import artifact, container
from moec.runtime.call.executor import load
from moec.runtime.device import device
from moec.runtime.package import Package
from moec.target import cpu
from tests.runtime import toy

GRAPH = """graph main(x: f32[T, 512]; w: f32[512, 512]) {
  y: f32[T, 512] = aten.linear.default(x, w)
  return y
}
"""
FORKS = """
import os, sys, signal, threading, time
import numpy as np
from moec.runtime.call.executor import load
from moec.runtime.package import Package
model = load(sys.argv[1])
x = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
right = model({"x": x})["y"]  # large: its kernels share work among threads
end = threading.Event()
def call():
    while not end.is_set():
        model({"x": x})
callers = [threading.Thread(target=call) for _ in range(2)]
for turn in range(15):
    if turn == 3:  # from here on a fork meets calls in their middle
        for caller in callers:
            caller.start()
    time.sleep(0.01 if turn > 3 else 0)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for threads that it does not have
        same = all(np.array_equal(model({"x": x})["y"], right) for _ in range(2))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    print(status)
end.set()
for caller in callers:
    caller.join()
print(np.array_equal(model({"x": x})["y"], right))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_runs_the_model(tmp_path: Path) -> None:
    graph = parse(GRAPH)
    weights = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(0))}
    package = build(Module.of(Program(graph, weights)), cpu.parse("cpu"))
    artifact.write(package, path := tmp_path / "large.moec", graphs={"main": GRAPH})
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(path)],
        capture_output=True, text=True, env=environment, timeout=100,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == ([*["0"] * 15, "True"], "")


def test_a_file_that_is_written_to(saved: Path) -> None:
    model = load(saved)
    model(toy.inputs())
    content = saved.read_bytes()
    saved.write_bytes(content)  # the same file, as cp writes it
    with pytest.raises(ArtifactError, match="was changed while the model in it is in use: load it"):
        model(toy.inputs())


def test_a_part_of_a_folder_that_is_cut(saved: Path) -> None:
    folder = saved.with_suffix(".folder")
    shutil.unpack_archive(saved, folder, "zip")
    model = load(folder)
    part = max(folder.glob("weights/*.bin"), key=lambda path: path.stat().st_size)
    os.truncate(part, 1)
    with pytest.raises(ArtifactError, match=f"{part.name} was changed while"):
        model(toy.inputs())


def test_a_file_that_is_replaced_stays_mapped(saved: Path, original: Path) -> None:
    model = load(saved)
    before = model(toy.inputs())["y"]
    other = saved.with_name("other.moec")
    other.write_bytes(b"something else")
    other.rename(saved)
    np.testing.assert_array_equal(model(toy.inputs())["y"], before)
    saved.unlink()
    np.testing.assert_array_equal(model(toy.inputs())["y"], before)


def test_what_a_killed_writer_left_is_removed(saved: Path) -> None:
    package = artifact.read(saved).package
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True)  # fmt: skip
    ended, here = int(done.stdout), os.getpid()
    from moec.runtime.artifact.container import writer_prefix

    stale, others = (saved.with_name(f"{writer_prefix(saved)}{n}.x") for n in (ended, here))
    for folder in (stale, others):
        folder.mkdir()
        (folder / "new").write_bytes(b"half")
    artifact.write(replace(package, arrays=dict(package.arrays)), saved, graphs={"main": toy.GRAPH})
    assert not stale.exists()
    assert others.exists()


def test_of_two_writers_the_later_one_refuses(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"

    def write_while_another_does() -> None:
        with container.replacing(path, folder=False, overwrite=False) as writer:
            writer.add({"a": b"late"})
            artifact.write(package, path, graphs={"main": toy.GRAPH})

    with pytest.raises(
        UsageError, match="was written by another process meanwhile, and is left as it is"
    ):
        write_while_another_does()
    load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.moec"]


def test_libraries_are_unloaded(saved: Path) -> None:
    def mappings() -> int:
        gc.collect()
        return len(Path("/proc/self/maps").read_text().splitlines())

    load(saved)(toy.inputs())
    before = mappings()
    for _ in range(20):
        result = load(saved)(toy.inputs())
    assert mappings() - before < 20
    assert np.isfinite(result["y"]).all()  # belongs to the caller, whatever became of the model


def test_outputs_that_no_memory_holds(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(saved)
    monkeypatch.setattr(checks, "SMALL", 1)
    monkeypatch.setattr(device, "free_memory", lambda: 10)
    with pytest.raises(InputError, match=r"the outputs take [\d.]+ \w+, and 10 bytes of memory"):
        model(toy.inputs())
