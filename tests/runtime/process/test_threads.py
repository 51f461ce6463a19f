"""Threads: every processor by default; the user's settings are kept and take effect."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.errors import UsageError
from moec.runtime.process.threads import SPINS, available, set_threads, shorten_spinning


def test_every_processor_is_used_unless_told():
    environment: dict[str, str] = {}
    assert set_threads(environment=environment) == available()
    assert environment["TVM_BIND_THREADS"] == "0"
    assert set_threads(3, environment) == 3
    assert environment["TVM_NUM_THREADS"] == "3"


def test_what_the_user_set_stays():
    environment = {"TVM_NUM_THREADS": "5", "TVM_BIND_THREADS": "1"}
    assert set_threads(environment=environment) == 5
    assert environment["TVM_BIND_THREADS"] == "1"


def test_no_threads_are_refused():
    with pytest.raises(UsageError, match="0 is not a positive number"):
        set_threads(0, {})


@pytest.mark.parametrize("value", ["abc", "0", "-3", "1.5", "9" * 20])
def test_a_number_of_threads_that_is_none_is_refused(value: str):
    with pytest.raises(UsageError, match=f"TVM_NUM_THREADS is '{value}': give a whole number from"):
        set_threads(environment={"TVM_NUM_THREADS": value})


def test_an_empty_variable_is_not_set():
    environment = {"TVM_NUM_THREADS": "", "TVM_BIND_THREADS": " "}
    assert set_threads(environment=environment) == available()
    assert environment["TVM_BIND_THREADS"] == "0"


def test_waiting_is_a_number_too():
    with pytest.raises(UsageError, match="TVM_THREAD_POOL_SPIN_COUNT is 'x': give a whole number"):
        set_threads(environment={"TVM_THREAD_POOL_SPIN_COUNT": "x"})


def test_the_runtime_alone_obeys():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moec.runtime.process.threads import available, set_threads; set_threads()\n"
        "import tvm; assert tvm.get_global_func('runtime.NumThreads')() == available()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    environment["TVM_USE_RUNTIME_LIB"] = "1"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_threads_of_pytorch_spin_shortly_unless_told() -> None:
    environment = {"OMP_WAIT_POLICY": " "}
    shorten_spinning(environment)
    assert environment["GOMP_SPINCOUNT"] == str(SPINS)
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment = {variable: "active"}
        shorten_spinning(environment)
        assert environment == {variable: "active"}


def test_waiting_is_set_before_torch_is_imported(tmp_path: Path) -> None:
    """GNU's OpenMP reads the variable as it is loaded."""
    program = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            sys.stdout.flush()\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from moec.__main__ import main\n"
        "main()\n"
    )
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    model = tmp_path / "model.py"
    model.touch()
    outputs = {"compile": ("-o", "out.moec"), "export": ("-o", "out.onnx"), "bisect": ()}
    for command, output in outputs.items():
        done = subprocess.run(
            [sys.executable, "-c", program, command, f"{model}:factory", *output],
            capture_output=True, text=True, env=unset, cwd=tmp_path, timeout=60,
        )  # fmt: skip
        assert done.stdout == f"{SPINS}\n", (command, done.stderr)
