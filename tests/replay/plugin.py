"""A pytest plugin that records every graph that a pass makes and every compiled kernel, as text.

    python -m pytest -p tests.replay.plugin --replay=FOLDER

`graph`: the result of a pass, and what it declined. `kernel`: the function as LLVM receives it,
after all passes of TVM and moec, with its target and options; `llvm`: the functions that it
imports. `program`: the calls of kernels and the memory that Relax planned.

A test owns the file `FOLDER/<its id>.txt`; what tests share (a fixture of a wider scope, a cached
function) is made as often as processes need it, so its file is named by its content too. Each owner
starts with an empty cache of moec, since cached results would not be recorded. Of a Hypothesis
test, the explicit examples run, and one generated example, the simplest: the others depend on the
source of the tests. Work in processes other than the test's is not recorded.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, is_hypothesis_test, settings

PLUGIN = "moec-replay"
LLVM = "target.build.llvm"
CONTENT = re.compile(r"_[0-9a-f]{16}\b")
"""The hash of its content in the name of a kernel."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--replay", metavar="FOLDER", help="write what passes and kernels are made")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--replay")
    if folder and not config.pluginmanager.has_plugin(PLUGIN):
        config.pluginmanager.register(Recorder(Path(folder).resolve()), PLUGIN)


def pytest_unconfigure(config: pytest.Config) -> None:
    recorder = config.pluginmanager.unregister(name=PLUGIN) if _recorder(config) else None
    if recorder is not None:
        recorder.stop()


def _recorder(config: pytest.Config) -> Recorder | None:
    return config.pluginmanager.get_plugin(PLUGIN)


class Recorder:
    """Between its construction and `stop` it watches passes and compilations of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[list[str]] = []
        self._patch = pytest.MonkeyPatch()
        self._watch_passes()
        self._watch_programs()
        self._llvm = self._watch_kernels()

    def stop(self) -> None:
        import tvm

        self._patch.undo()
        tvm.register_global_func(LLVM, self._llvm, override=True)

    # What is recorded.

    def _add(self, kind: str, name: str, text: str) -> None:
        if self._open:
            self._open[-1].append(f"== {kind} {name}\n{text.strip()}\n")

    def _watch_passes(self) -> None:
        """Each pass that runs makes a PassResult."""
        from moec.ir.text import print_graph
        from moec.passes.core.runner import PassResult

        make = PassResult.__init__

        def record(step: PassResult, *args: Any, **options: Any) -> None:
            make(step, *args, **options)
            declined = [f"declined {d.where}: {d.reason}\n" for d in step.declined]
            self._add("graph", step.name, "".join([print_graph(step.program.graph), *declined]))

        self._patch.setattr(PassResult, "__init__", record)

    def _watch_programs(self) -> None:
        from tvm.relax import ExecBuilder, _ffi_api

        make = _ffi_api.VMLink

        def record(builder: ExecBuilder, *args: Any) -> Any:
            self._add("program", "main", stable("main", builder.get().as_text()))
            return make(builder, *args)

        self._patch.setattr(_ffi_api, "VMLink", record)

    def _watch_kernels(self) -> Callable[..., Any]:
        """TVM looks up the function that calls LLVM by name."""
        import tvm

        make: Callable[..., Any] = tvm.get_global_func(LLVM)

        def record(module: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
            kernels = ((str(v.name_hint), f) for v, f in module.functions_items())
            for name, kernel in sorted(kernels, key=lambda pair: pair[0]):
                short = CONTENT.sub("", name)
                self._add("kernel", short, f"# {target}\n{stable(name, kernel.script())}\n")
                self._add("llvm", short, _imports(kernel))
            return make(module, target)

        tvm.register_global_func(LLVM, record, override=True)
        return make

    # Who made it.

    @contextmanager
    def _owner(self, name: str, *, shared: bool) -> Iterator[None]:
        self._open.append([])
        try:
            with tempfile.TemporaryDirectory(prefix="moec-replay-") as cache:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("MOEC_CACHE", cache)
                    yield
        finally:
            if text := "".join(sorted(self._open.pop())):
                file = self._folder / file_name(name, text if shared else "")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._owner(item.nodeid, shared=False):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        with self._owner(f"fixture/{fixturedef.argname}", shared=True):
            return (yield)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        modules = {m for name, m in sys.modules.items() if name.startswith("tests.")}
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                _simplest_example(item)
            if isinstance(item, pytest.Function):
                modules.add(item.module)
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, functools._lru_cache_wrapper):
                    self._patch.setattr(module, name, self._shared(value))

    def _shared(self, cached: Callable[..., Any]) -> Callable[..., Any]:
        """Otherwise the first test that calls it would own the records."""

        @functools.wraps(cached)
        def call(*args: Any, **options: Any) -> Any:
            with self._owner(f"cached/{cached.__name__}", shared=True):
                return cached(*args, **options)

        return call


def file_name(owner: str, text: str) -> str:
    """A path of names that every file system takes; with a text, it says which text."""
    path, _, test = owner.partition("::")
    name = re.sub(r"[^\w.\[\]-]+", "_", test)
    if text or name != test or len(name) > 150:
        name = f"{name[:150]}-{hashlib.sha256((test + text).encode()).hexdigest()[:12]}"
    return f"{path}/{name}.txt"


def stable(name: str, text: str) -> str:
    """The text without parts that differ from run to run, or that repeat the content of a kernel.
    TVM's functions that compute sizes have their statements in the order of addresses, so they are
    sorted."""
    lines = CONTENT.sub("", text).splitlines()
    return "\n".join(sorted(lines) if name.startswith("shape_func") else lines)


def _imports(kernel: Any) -> str:
    """The text of LLVM functions in a kernel, which its own text leaves out."""
    from tvm.tirx import AttrStmt
    from tvm_ffi.structural import structural_walk

    texts: list[str] = []

    def visit(attribute: AttrStmt) -> None:
        if attribute.attr_key == "pragma_import_llvm":
            texts.append(str(attribute.value.value))

    structural_walk(kernel.body, (AttrStmt, visit))
    return "\n".join(texts)


def _simplest_example(item: pytest.Item) -> None:
    test: Any = item.obj  # type: ignore[attr-defined]
    test = getattr(test, "__func__", test)
    test._hypothesis_internal_use_settings = settings(
        test._hypothesis_internal_use_settings,
        max_examples=1,
        phases=(Phase.explicit, Phase.generate),
        derandomize=True,
        database=None,
    )
