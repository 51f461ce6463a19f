"""Copies of 4 bits of experts' weights, and the C code that widens them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moec.codegen.cpu import link
from moec.codegen.cpu.narrow_copy import narrow_copy
from tests.runtime.expert_store.models import widened

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


@pytest.fixture(scope="session")
def widen(tmp_path_factory) -> Any:
    library = tmp_path_factory.mktemp("widen") / "widen.so"
    source = Path(link.__file__).with_name("narrow_copy.c")
    command = ["cc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(library)).expert_store_widen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 31, 32, 100, 4096])
def test_a_copy_of_any_size_is_widened(widen, dtype, elements):
    """To products that the dtype has exactly; what is behind an expert stays."""
    drawn = np.random.default_rng(elements).standard_normal((2, elements)) * [[1], [1e-4]]
    copies = narrow_copy(drawn.astype(DTYPES[dtype]), dtype)
    for copy, exact in zip(copies, drawn, strict=True):
        to = np.full(elements + 32, 7, DTYPES[dtype])
        size, kind = ctypes.c_int64(elements), list(DTYPES).index(dtype)
        widen(to.ctypes.data_as(ctypes.c_void_p), copy.ctypes.data_as(ctypes.c_void_p), size, kind)
        expected = widened(copy[None], elements)[0]
        assert (to[:elements].astype(np.float32) == expected).all()
        assert (to[elements:] == 7).all()
        assert np.abs(expected - exact).max() <= np.abs(exact).max() / 7
