"""TVM's first error reads symbols before torch is loaded, and tells the same."""

from __future__ import annotations

import os
import subprocess
import sys

ORDER = """
import sys
events = []

def note(event, args):
    if event == "ctypes.dlsym" and args[1] == "TVMFFIBacktrace":
        events.append("symbols")
    if event == "import" and args[0] == "torch._C":
        events.append("torch")

sys.addaudithook(note)
import moec
moec.load
print(*dict.fromkeys(events))
moec.compile
print(*dict.fromkeys(events))
import tvm
try:
    tvm.ir.Op.get("moec.none")
except Exception as error:
    print("moec.none" in str(error))
"""


def _run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ORDER],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.splitlines()


def test_symbols_are_read_before_torch_is_loaded_and_not_to_load_an_artifact() -> None:
    """`import tvm` took half a second longer, for symbols of torch in errors that it catches."""
    assert _run() == ["", "symbols torch", "True"]


def test_developers_keep_the_names_of_functions() -> None:
    assert _run(MOEC_DEBUG="1") == ["", "torch", "True"]
