"""Threads: every processor by default, the user's settings kept, and in force in the runtime."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moec.runtime.threads import available, set_threads


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
    with pytest.raises(ValueError, match="0 is not a positive number"):
        set_threads(0, {})


def test_the_runtime_alone_obeys():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moec.runtime.threads import available, set_threads; set_threads()\n"
        "import tvm; assert tvm.get_global_func('runtime.NumThreads')() == available()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("NUM_THREADS")}
    environment["TVM_USE_RUNTIME_LIB"] = "1"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
