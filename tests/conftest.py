"""One thread, a fixed random stream in CI, and text compared with the files of tests/golden."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# Before anything imports tvm or torch: tests run side by side, and each is small enough that
# threads cost more than they bring. A test of threading sets its own count.
os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# All processes of a run share what they compile, and start with nothing: each kernel is compiled
# once. $MOEC_TEST_CACHE names a folder that is kept for the next run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if not (FOLDER := os.environ.get("MOEC_TEST_CACHE", "")):
        FOLDER = tempfile.mkdtemp(prefix="moec-test-cache-")
        atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
    os.environ["MOEC_CACHE"] = FOLDER
# `timeout` and `kill` interrupt the run as Ctrl-C does, so that the folder is removed.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
# A test that starts Python finds moec compiled by the one before.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch
from hypothesis import settings

import moec
from moec.sources.memory import ranges
from tests.fresh import Warm
from tests.once import Once, folders_in

# pytest listens to every logger that does not propagate. This one has no other listener, and where
# it has one, torch writes a record, with stacks and graphs, of every step of an export.
TRACE = logging.getLogger("torch.__trace")
TRACE.handlers.clear()
TRACE.propagate = True
sys.dont_write_bytecode = False  # test modules are compiled once, as moec is
torch.set_num_threads(1)
ranges.ABSENT_ACCESS = 0  # reading a weight whose memory was given back ends the run
torch.manual_seed(
    int(os.environ.get("MOEC_TEST_SEED", "0"))
)  # what test modules draw while they are imported

# No deadline: the first call of a torch or TVM function takes as long as a thousand others.
settings.register_profile("moec", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("moec")

pytest_plugins = ["tests.cpu_times", "tests.tiers"]

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files instead of comparing with them",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test modules and the libraries that they import are no garbage, which to look for takes a
    sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The libraries that are imported now stay, as hundreds of thousands of objects. Looking for
    garbage among them again and again takes a tenth of torch.export's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700_000, 5, 4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whatever ran before; other ones: MOEC_TEST_SEED."""
    torch.manual_seed(int(os.environ.get("MOEC_TEST_SEED", "0")))


@pytest.fixture
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files during a test, after which it must be empty."""
    multiprocessing.util.get_temp_dir()  # multiprocessing keeps its own, with sockets
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == []


def golden_file(request: pytest.FixtureRequest) -> Path:
    """tests/golden/<folder and module of the test>/<name of the test>.txt"""
    module = request.path.relative_to(TESTS).with_suffix("")
    name = request.node.name.replace("/", "_")
    return GOLDEN / module / f"{name}.txt"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with text once in a test; the text must be that of the test's golden file."""
    path = golden_file(request)

    def check(text: str) -> None:
        __tracebackhide__ = True
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        where = path.relative_to(TESTS.parent)
        if not path.exists():
            pytest.fail(f"{where} is missing: run with --update-golden, then read what it wrote")
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"differs from {where}; if it should, run with --update-golden"

    return check


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by its name, which the first test that needs it fills."""
    base = tmp_path_factory.getbasetemp()
    return folders_in(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs programs in forks of a process that has imported the libraries."""
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The trained checkpoint: folder of examples/tiny_moe."""
    return TESTS.parent / "examples" / "tiny_moe" / "checkpoint"


@pytest.fixture(scope="session")
def compiled_tiny_moe(tiny_moe: Path) -> moec.CompiledModel:
    """The checkpoint compiled and verified, for all tests that do not change how."""
    return moec.compile(tiny_moe)


@pytest.fixture(scope="session")
def short_moe(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of tiny_moe's four layers, for tests to which more would tell nothing."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("short_moe")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, num_hidden_layers=2)
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((tiny_moe / file).read_bytes())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; without one the test is skipped."""
    from playwright.sync_api import expect, sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed: make chromium installs it")
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        # Containers run as root, for which Chromium has no sandbox; the page is moec's.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
