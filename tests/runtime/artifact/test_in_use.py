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

import moec
from moec.codegen.package import build
from moec.errors import ArtifactError, InputError, UsageError
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.runtime import checks
from moec.runtime.artifact import artifact, container, mapped_arrays
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


def switch(link: Path, target: Path) -> None:
    """Replace a link in one step, as a deployment between two slots does."""
    (new := link.with_name("next")).symlink_to(target)
    new.rename(link)


def test_a_slot_behind_a_link_that_is_written_to(saved: Path) -> None:
    """The path of the model leads to the other slot when its file is written to."""
    (green := saved.with_name("green.moec")).write_bytes(saved.read_bytes())
    switch(current := saved.with_name("current.moec"), saved)
    model = load(current)
    model(toy.inputs())
    switch(current, green)
    model(toy.inputs())
    saved.write_bytes(b"\0" * saved.stat().st_size)
    with pytest.raises(ArtifactError, match=r"current\.moec was changed while"):
        model(toy.inputs())


@pytest.mark.parametrize("size", [None, 1])
def test_a_file_that_is_moved_and_then_written_to(saved: Path, size: int | None) -> None:
    """Cut to one byte, the kernels would end the process with a bus error."""
    model = load(saved)
    moved = saved.rename(saved.with_name("moved.moec"))
    if size is None:
        moved.write_bytes(b"\0" * moved.stat().st_size)
    else:
        os.truncate(moved, size)
    with pytest.raises(ArtifactError, match=r"toy\.moec was changed while"):
        model(toy.inputs())


def test_a_folder_that_is_moved_and_then_written_to(saved: Path) -> None:
    folder = saved.with_suffix(".folder")
    shutil.unpack_archive(saved, folder, "zip")
    model = load(folder)
    moved = folder.rename(saved.with_name("moved"))
    part = max(moved.glob("weights/*.bin"), key=lambda path: path.stat().st_size)
    os.truncate(part, 1)
    with pytest.raises(ArtifactError, match=f"{part.name} was changed while"):
        model(toy.inputs())


def test_a_folder_of_which_one_file_is_moved_and_another_cut(saved: Path) -> None:
    """The first is verified again by all digests, which would read the second."""
    folder = saved.with_suffix(".folder")
    shutil.unpack_archive(saved, folder, "zip")
    model = load(folder)
    weights = sorted(folder.glob("weights/*.bin"))
    weights[0].chmod(0o400)
    os.truncate(weights[-1], 1)
    with pytest.raises(ArtifactError, match=f"{weights[-1].name} was changed while"):
        model(toy.inputs())


def weights_of(path: Path) -> slice:
    """The bytes of the largest weight in an artifact's file."""
    content = path.read_bytes()
    spans = container.part_spans(path, lambda start, size: content[start : start + size])
    weights = [span for name, span in spans.items() if name.startswith("weights/")]
    return max(weights, key=lambda span: span.stop - span.start)


def test_a_file_whose_time_was_set_back(saved: Path) -> None:
    """As by tools that copy times; only the time of the change of the file's state differs."""
    model, before = load(saved), saved.stat()
    span = weights_of(saved)
    with saved.open("r+b") as file:
        file.seek(span.start)
        file.write(b"\0" * (span.stop - span.start))
    os.utime(saved, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(ArtifactError, match="was changed while"):
            model(toy.inputs())


def test_other_names_and_rights_of_a_file_change_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are verified by the digests, once."""
    model = load(saved)
    before = model(toy.inputs())["y"]
    hashed = []
    check = mapped_arrays.check_digests
    monkeypatch.setattr(mapped_arrays, "check_digests", lambda *a: (hashed.append(1), check(*a)))
    for change in (lambda: saved.chmod(0o400), lambda: os.link(saved, saved.with_name("other"))):
        change()
        for _ in range(3):
            np.testing.assert_array_equal(model(toy.inputs())["y"], before)
    assert len(hashed) == 2


@pytest.mark.parametrize("folder", [False, True])
def test_a_private_copy_is_not_affected(saved: Path, folder: bool) -> None:
    path = saved
    if folder:
        path = saved.with_suffix(".folder")
        shutil.unpack_archive(saved, path, "zip")
    models = load(path, copy=True), moec.load(path, copy=True).executor
    before = [model(toy.inputs())["y"] for model in models]
    for file in path.rglob("*.bin") if folder else [path]:
        os.truncate(file, 1)
    for model, y in zip(models, before, strict=True):
        np.testing.assert_array_equal(model(toy.inputs())["y"], y)


def test_a_private_copy_that_no_memory_holds(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: 10)
    with pytest.raises(ArtifactError, match=r"its copy takes [\d,]+ bytes, and 10 bytes of mem"):
        load(saved, copy=True)


def test_no_file_stays_open(saved: Path) -> None:
    def files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    load(saved)(toy.inputs())
    before = files()
    load(saved)(toy.inputs())
    assert files() == before


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


CUT = """
import os, sys
import numpy as np
from moec import __main__ as line
from moec.runtime.artifact.mapped_arrays import MappedArrays
from moec.runtime.call.executor import load

def cli(**_):
    model = load(path)
    x = np.ones((rows, 512), np.float32)
    model({"x": x})
    unchanged = MappedArrays.check_unchanged
    def cut(self):
        unchanged(self)
        os.truncate(path, 4096)
    MappedArrays.check_unchanged = cut
    if rows:
        model({"x": x})
    model.package.arrays["w"].sum()

path, rows, line.cli = sys.argv[1], int(sys.argv[2]), cli
line.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGBUS")
@pytest.mark.parametrize("rows", [1, 600])
def test_a_file_that_is_cut_during_a_call_ends_the_command_with_a_sentence(
    tmp_path: Path, rows: int
) -> None:
    """A kernel, in any thread, reads bytes that are gone: SIGBUS."""
    path = tmp_path / "model.moec"
    weight = torch.ones(512, 512)
    package = build(Module.of(Program(parse(GRAPH), {"w": weight})), cpu.parse("cpu"))
    artifact.write(package, path, graphs={"main": GRAPH})
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(path), str(rows)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "error: a file was cut while the model in it is in use" in done.stderr
    assert "rename it over the old one" in done.stderr
