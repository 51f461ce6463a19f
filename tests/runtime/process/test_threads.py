"""Threads: every processor by default; the user's settings are kept and take effect."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moec.errors import UsageError
from moec.runtime.process.threads import available, set_threads


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
