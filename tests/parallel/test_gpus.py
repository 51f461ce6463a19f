"""Ranks on GPUs without a GPU: emulated kernels under TVM's own CUDA runtime and a fake driver.

The stand-in for a GPU takes tensors of the CPU, so exchanges are by gloo instead of NCCL; all else,
from `moec compile --plan --target cuda:…` to torchrun, is what GPUs would run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from moec.codegen.backends.cuda import backend
from moec.parallel.store import load_rank
from moec.runtime.package import DECODE, MAIN
from tests.cuda_emulator.driver import stand_in, write_driver
from tests.cuda_emulator.emulate import needs_compiler
from tests.once import Once
from tests.parallel.test_text import cli, folder

__all__ = ["folder"]  # a fixture

TARGET = "cuda:sm_80,sm_90a"
TOKENS = 4
SCRIPT = """
import ctypes
import os
import sys

from moec.__main__ import cli
from moec.parallel import process
from moec.runtime.device.device import device_of

driver = ctypes.CDLL("libcuda.so.1")
counts = (ctypes.c_long * 7).in_dll(driver, "counts")
index = os.environ["LOCAL_RANK"]

def stand_in(target):
    assert target == "cuda:sm_80,sm_90a"
    return device_of(f"cuda:{index}", copies=True)

process.device_of_rank = stand_in
for words in (sys.argv[1:6], sys.argv[6:]):
    before = counts[2]
    cli.main(["run", sys.argv[1], *words[1:]], standalone_mode=False)
    assert counts[2] > before, "no kernel was launched"
"""


@pytest.fixture(scope="session")
def on_gpus(folder: Path, once: Once) -> Path:
    """The ranks of the model of `folder`, the fake driver, and a script that runs a rank."""

    def fill(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "CUDA", stand_in(path, "sm_90a"))
            words = ["--plan", str(folder / "plan.json"), "-o", str(path / "two.ranks")]
            cli("compile", str(folder / "model"), *words, "--target", TARGET)
        (path / "rank.py").write_text(SCRIPT)

    return once("gpus", fill)
