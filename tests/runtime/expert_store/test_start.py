"""Models with experts on disk compute the bits of models in memory, or refuse with one sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.errors import ArtifactError, InputError, UsageError
from moec.runtime.artifact.artifact import DIGESTS, read
from moec.runtime.artifact.container import part_spans
from moec.runtime.call.caches import bytes_of_caches
from moec.runtime.call.executor import Executor, start
from moec.runtime.expert_store.device import BUFFERED, DIRECT
from moec.runtime.expert_store.native import POLICIES, StoreOptions
from moec.runtime.expert_store.slot_memory import allocate
from moec.runtime.expert_store.start import (
    TextRoom,
    start_with_slots,
    start_within,
    store_report,
)
from tests.runtime.expert_store.models import EXPERTS, FORMATS, LAYERS, artifact

IDS = np.random.default_rng(0).integers(100, size=(3, 12))
INPUTS = (IDS, IDS[:1, :1], IDS[:2, :7], IDS[:0], IDS[:1], IDS)


@pytest.fixture(scope="session", params=FORMATS)
def stored(request, once) -> Path:
    return artifact(once, request.param)


@pytest.fixture
def path(once, tmp_path) -> Path:
    """A copy of its own, of 16-bit floats."""
    return Path(shutil.copy(artifact(once, None), tmp_path / "model.moec"))


def logits(model: Executor, ids: np.ndarray) -> bytes:
    return model({"input_ids": ids})["logits"].tobytes()


def in_slots(path: Path, slots: int = 2, **options: object) -> Executor:
    return start_with_slots(read(path), [slots] * LAYERS, DIRECT, StoreOptions(**options))


@pytest.mark.parametrize("slots", [1, 2, 5, EXPERTS])
def test_the_bits_do_not_depend_on_slots(stored, slots):
    right = [logits(start(read(stored)), ids) for ids in INPUTS]
    for policy in POLICIES:
        for reading in (DIRECT, BUFFERED):
            options = StoreOptions(readers=2, policy=policy)
            model = start_with_slots(read(stored), [slots] * LAYERS, reading, options)
            assert [logits(model, ids) for ids in INPUTS] == right
            assert [logits(model, ids) for ids in INPUTS] == right


def test_text_goes_on_as_in_memory(stored):
    prompts = [[5, 6, 7, 8, 9], [1], [3, 2, 1] * 5]
    right = moec.load(stored).generate(prompts, max_new_tokens=20)
    model = moec.model.load.LoadedModel(stored, read(stored), in_slots(stored))
    assert model.generate(prompts, max_new_tokens=20) == right


def test_layers_with_different_numbers_of_slots(path):
    model = start_with_slots(read(path), [1, 6])
    assert logits(model, IDS) == logits(start(read(path)), IDS)
    assert store_report(model).slots == (1, 6)


def test_what_was_read_is_counted(path):
    model = in_slots(path, EXPERTS)
    logits(model, IDS)
    report = store_report(model)
    counts = report.counts
    assert report.layers == tuple(f"model.layers.{n}.mlp.experts" for n in range(LAYERS))
    assert report.experts == (EXPERTS,) * LAYERS
    assert report.slot_bytes == report.expert_bytes
    assert counts.calls == LAYERS
    assert counts.hits == 0
    assert 0 < counts.bytes_read <= report.expert_bytes
    logits(model, IDS)
    again = store_report(model).counts
    assert (again.hits, again.bytes_read) == (again.visits / 2, counts.bytes_read)


def test_a_limit_that_holds_all_needs_no_store(path):
    model = moec.load(path, memory="8GiB")
    assert store_report(model.executor) is None


def test_a_limit_that_is_too_small(path):
    message = "memory is 50.0 MB, and this model needs .* for one expert of each layer"
    with pytest.raises(UsageError, match=message):
        start_within(read(path), 50_000_000)


def test_a_model_without_a_store(once):
    def write(folder: Path) -> None:
        import torch

        layer = torch.nn.Linear(8, 8)
        moec.compile(layer, (torch.ones(2, 8),)).save(folder / "plain.moec")

    plain = once("plain", write) / "plain.moec"
    with pytest.raises(UsageError, match="was compiled without a store of experts: compile it wi"):
        moec.load(plain, memory=1000)


def test_memory_is_a_size_of_a_cpu(path):
    with pytest.raises(UsageError, match="memory is 'much': give bytes"):
        moec.load(path, memory="much")
    with pytest.raises(UsageError, match="leaves experts in the file, and copy reads all"):
        moec.load(path, memory="1GiB", copy=True)


LIMITED = """
import resource, sys
import numpy as np
from pathlib import Path
from moec.runtime.artifact.artifact import read
from moec.runtime.device.library import tvm_ffi
from moec.runtime.expert_store.start import start_with_slots
tvm_ffi()
status = Path("/proc/self/status").read_text()
size = int(status.partition("VmSize:")[2].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20),) * 2)
model = start_with_slots(read(Path(sys.argv[1])), [2, 2], "direct")
for count in (40, 1):
    ids = np.arange(count).reshape(1, -1)
    sys.stdout.buffer.write(model({"input_ids": ids})["logits"].tobytes())
"""


def test_the_file_is_never_in_memory(path):
    """Under a limit of its address space that holds the slots."""
    right = [logits(start(read(path)), np.arange(n).reshape(1, -1)) for n in (40, 1)]
    run = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(run, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"".join(right)


def spans_of_experts(path: Path) -> list[slice]:
    content, arrays = path.read_bytes(), read(path).package
    spans = part_spans(path, lambda start, size: content[start : start + size])
    manifest = read(path).manifest
    names = [n for layer in arrays.store.layers for stack in layer for n in stack.arrays]
    return [spans[manifest.arrays[name].part] for name in names]


def test_an_altered_expert_is_refused_when_it_is_read(path):
    span = spans_of_experts(path)[1]
    with path.open("r+b") as file:
        file.seek(span.stop - 1)
        file.write(b"\x55")
    model = in_slots(path)
    message = f"expert {EXPERTS - 1} of model.layers.0.mlp.experts was altered: its SHA-256 dif"
    with pytest.raises(ArtifactError, match=message):
        logits(model, np.arange(100)[:60].reshape(1, -1))


def test_digests_of_experts_are_checked(path, tmp_path):
    folder = tmp_path / "folder"
    shutil.unpack_archive(path, folder, "zip")
    digests = folder / DIGESTS
    digests.write_bytes(bytes(digests.stat().st_size))
    with pytest.raises(ArtifactError, match=f"{DIGESTS} was altered"):
        read(folder)


def test_a_file_that_becomes_shorter(path):
    """Where no call compares the file's state: what is read during a call."""
    model = in_slots(path)
    model._checked = None
    right = logits(model, IDS)
    os.truncate(path, spans_of_experts(path)[-1].start)
    with pytest.raises(ArtifactError, match=r"of model\.layers\.1\.mlp\.experts cannot be read: t"):
        logits(model, IDS)
    with pytest.raises(ArtifactError, match="the file has become shorter"):
        logits(model, IDS)
    assert right


def test_a_file_that_is_written_while_it_is_used(path):
    model = in_slots(path)
    logits(model, IDS)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError, match="was changed while the model in it is in use"):
        logits(model, IDS)


def test_what_is_read_after_the_time_was_set_back_is_hashed_again(path):
    model = in_slots(path, 1)
    logits(model, IDS)
    before = path.stat()
    for span in spans_of_experts(path):
        with path.open("r+b") as file:
            file.seek(span.start)
            file.write(bytes(span.stop - span.start))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="was altered"):
        logits(model, IDS)


BROKEN_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static int failing(void) { FILE *f = fopen(getenv("BROKEN"), "r"); return f ? fclose(f), 1 : 0; }
ssize_t pread(int fd, void *to, size_t size, off_t at) {
  ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  if (failing()) return errno = EIO, -1;
  if (getenv("SLOW")) usleep(atoi(getenv("SLOW")));
  if (getenv("READING")) fclose(fopen(getenv("READING"), "w")), sleep(60);
  return real(fd, to, size, at);
}
"""
ON_BROKEN_DISK = """
import os, sys
import numpy as np
from pathlib import Path
from moec.errors import ArtifactError
from moec.runtime.artifact.artifact import read
from moec.runtime.call.executor import start
from moec.runtime.expert_store.start import start_with_slots
path, broken = Path(sys.argv[1]), Path(os.environ["BROKEN"])
ids = {"input_ids": np.arange(40).reshape(4, 10)}
right = start(read(path))(ids)["logits"].tobytes()
model = start_with_slots(read(path), [2, 2], "direct")
same = lambda: model(ids)["logits"].tobytes() == right
print(same())
broken.touch()
try:
    model(ids)
except ArtifactError as error:
    print(str(error).partition("expert ")[2])
broken.unlink()
print(same())
"""


@pytest.fixture
def broken_disk(path, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Starts ON_BROKEN_DISK with variables of BROKEN_DISK."""
    source, library = tmp_path / "disk.c", tmp_path / "disk.so"
    source.write_text(BROKEN_DISK)
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)

    def begin(**variables: str) -> subprocess.Popen[str]:
        disk = {"LD_PRELOAD": str(library), "BROKEN": str(tmp_path / "broken"), **variables}
        run = [sys.executable, "-c", ON_BROKEN_DISK, str(path)]
        return subprocess.Popen(run, env=os.environ | disk, stdout=subprocess.PIPE, text=True)

    return begin


@pytest.mark.parametrize("slow", [{}, {"SLOW": "3000"}])
def test_a_disk_that_fails(broken_disk, slow):
    """A read that fails ends its call with one sentence, and the next call is right."""
    with broken_disk(**slow) as process:
        done, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    first, failure, last = done.splitlines()
    assert (first, last) == ("True", "True")
    assert failure.endswith("of model.layers.0.mlp.experts cannot be read: Input/output error")


def test_a_process_that_is_killed_while_it_reads(path, broken_disk, tmp_path):
    """It leaves no file behind, and the artifact and another process as they were."""
    model, content = in_slots(path), path.read_bytes()
    right, reading, temporary = logits(model, IDS), tmp_path / "reading", tmp_path / "temporary"
    temporary.mkdir()
    with broken_disk(READING=str(reading), TMPDIR=str(temporary)) as process:
        while not reading.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not list(temporary.iterdir())
    assert path.read_bytes() == content
    assert logits(model, IDS) == right == logits(in_slots(path), IDS)


def test_a_forked_process_reads_too(path):
    model = in_slots(path, readers=2)
    right = logits(model, IDS)
    child = os.fork()
    if child == 0:
        os._exit(0 if logits(model, IDS) == right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert logits(model, IDS) == right


def test_threads_and_two_models_of_one_file(path):
    models = [in_slots(path, n, readers=2) for n in (1, 3)]
    right, wrong = logits(start(read(path)), IDS), []

    def call(model: Executor) -> None:
        wrong.extend(n for n in range(5) if logits(model, IDS) != right)

    threads = [threading.Thread(target=call, args=(models[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closing_ends_the_readers(path):
    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))  # those of others may start meanwhile

    first = in_slots(path, readers=4)
    logits(first, IDS)  # the pool of kernels starts with it
    before = threads()
    model = in_slots(path, readers=4)
    logits(model, IDS)
    started = threads() - before
    del model
    end = time.monotonic() + 5  # a thread is listed for a moment after it was joined
    while len(started & threads()) > len(started) - 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(started & threads()) <= len(started) - 4


def test_other_functions_are_refused(path):
    with pytest.raises(InputError, match="no function 'recorded'"):
        in_slots(path)({"input_ids": IDS}, "recorded")


def test_memory_that_the_system_does_not_give(path, monkeypatch):
    def no_memory(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr("mmap.mmap", no_memory)
    with pytest.raises(UsageError, match=r"the system does not give 8\.0 MB for experts"):
        allocate([((10**6,), np.dtype(np.int64))])
    with pytest.raises(ArtifactError, match=r"model\.moec cannot be mapped: no memory"):
        read(path)


def test_caches_beyond_the_limit_are_refused(path):
    opened = read(path)
    ports = opened.package.functions["decode"].caches
    caches = bytes_of_caches(ports, texts=1, room=20)
    executor = start_with_slots(opened, [2] * LAYERS, caches=caches)
    model = moec.model.load.LoadedModel(path, opened, executor)
    assert len(model.generate([[1] * 10], max_new_tokens=10)[0]) == 20
    message = "the caches of the texts take .*, and memory has room for .* give fewer or shorter"
    with pytest.raises(InputError, match=message):
        model.generate([[1] * 10] * 2, max_new_tokens=10)


def test_room_for_caches_is_a_part_of_the_limit(path):
    least = re.compile(r" and ([\d.]+) MB for texts")
    sizes = []
    for room in (TextRoom(1, 32), TextRoom(10_000, 32)):
        with pytest.raises(UsageError, match=least) as refusal:
            start_within(read(path), 1, room=room)
        match = least.search(str(refusal.value))
        assert match
        sizes.append(float(match[1]))
    ports = read(path).package.functions["decode"].caches
    assert sizes[1] - sizes[0] == pytest.approx(bytes_of_caches(ports, 9_999, 32) / 1e6, abs=5)


CUT = """
import os, sys
from pathlib import Path
import numpy as np
from moec.errors import ArtifactError
from moec.runtime.artifact.artifact import read
from moec.runtime.expert_store.start import start_with_slots
path = Path(sys.argv[1])
opened = read(path)
model = start_with_slots(opened, [2] * int(sys.argv[2]))
stored = {name for layer in opened.package.store.layers for s in layer for name in s.arrays}
arrays = model.package.arrays
before = {name: arrays[name].tobytes() for name in model.package.params if name not in stored}
assert before
size = path.stat().st_size
for left in (size * 2 // 3, 4096, 0):
    os.truncate(path, left)
    assert all(arrays[name].tobytes() == content for name, content in before.items())
    assert all(bytes(opened.files[name]) is not None for name in opened.files)
    try:
        model({"input_ids": np.zeros((1, 5), np.int64)})
    except ArtifactError as error:
        print(error)
"""


def test_no_byte_of_a_model_with_a_store_is_mapped(path) -> None:
    """Reading mapped bytes of a file that was cut ends the process by SIGBUS."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(path), str(LAYERS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = f"{path} was changed while the model in it is in use: load it again"
    assert [line[: len(words)] for line in done.stdout.splitlines()] == [words] * 3
