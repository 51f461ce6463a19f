"""Which tests run, and in which order, by the CPU seconds in tests/times.json.

`--tier fast`: those below half a second, and one of each door however long. `--tier nightly`: what
other tests cover in short. `--tier rest`: the others. `--tier all`: fast and rest. A test without a
recorded time is fast.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.cpu_times import read_times, times_file

FAST = 0.5
"""CPU seconds. Tests below are in the fast tier."""
SMOKES = {
    "compile, run, save": "tests/api/test_compile.py::test_a_saved_model_equals_eager",
    "torch.compile": "tests/dynamo/test_inference.py::test_one_compilation_serves_ten_token_counts",
    "ONNX": "tests/export/test_onnx.py::test_equals_eager[None-cpu]",
    "two ranks": "tests/parallel/test_launch.py::test_two_hosts",
    "CUDA, emulated": (
        "tests/codegen/backends/cuda/test_models.py::test_emulated_models_equal_eager[qwen2_moe]"
    ),
    "a page": "tests/docs/test_docs.py::test_the_code_of_a_page_runs[capture.md]",
    "an example": "tests/examples/test_examples.py::test_example[01_compile_and_run]",
}
"""By door, the test that is in the fast tier however long it takes."""
LONG = 10.0
"""CPU seconds. Tests from here on run first, so that no process waits for one at the end; the
others keep their order, since neighbours share what their file prepares."""
LEFT_OUT = "moec_left_out"
NIGHTLY = {
    "tests/examples/": 10.0,  # their models are those of tests/systems and of the demo
    "tests/systems/test_examples.py": 10.0,
    "tests/codegen/cuda/test_static.py": 0.0,  # for six GPUs; the emulator runs the kernels
}
"""By file or folder, the CPU seconds from which a test runs at night, unless it is a smoke."""
OTHERS = {"fast": "make test-all", "rest": "make test", "all": "make test-nightly"}
OTHERS["nightly"] = OTHERS["fast"]
"""By tier, the command that runs what is left out."""


class Tiers:
    """`left_out`: the number of tests that are left out, and that of all. It is set by the process
    that collects, or comes from those that do."""

    def __init__(self) -> None:
        self.left_out: tuple[int, int] | None = None

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        seconds = read_times(times_file(config))
        tier = config.getoption("--tier")
        if tier:
            tiers = ("fast", "rest") if tier == "all" else (tier,)
            left_out = [item for item in items if tier_of(item.nodeid, seconds) not in tiers]
            self.left_out = len(left_out), len(items)
            others = set(left_out)
            items[:] = [item for item in items if item not in others]
            config.hook.pytest_deselected(items=left_out)
        if hasattr(config, "workeroutput"):
            config.workeroutput[LEFT_OUT] = self.left_out
        items.sort(key=lambda item: -max(seconds.get(item.nodeid, 0.0), LONG))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """A process of xdist has ended; they all collect the same."""
        self.left_out = getattr(node, "workeroutput", {}).get(LEFT_OUT, self.left_out)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        if self.left_out:
            count, total = self.left_out
            command = OTHERS[config.getoption("--tier")]
            terminalreporter.write_line(
                f"{count:,} of {total:,} tests left out: `{command}` runs them"
            )


def tier_of(name: str, seconds: Mapping[str, float]) -> str:
    cost = seconds.get(name, 0.0)
    if name in SMOKES.values():
        return "fast"
    if any(name.startswith(part) and cost >= least for part, least in NIGHTLY.items()):
        return "nightly"
    return "fast" if cost < FAST else "rest"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=list(OTHERS), help="a part of the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(), "moec-tiers")
