"""Machine code of CUDA kernels: by nvcc or from the cache, and what is said where neither is."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.cache import OBJECTS, Store, entries
from moec.codegen.backends.cuda.backend import cubin
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.cuda.routing.dispatch import combine
from moec.codegen.specs.routing import CombineSpec
from moec.errors import TargetError
from moec.target import nvidia
from moec.target.cuda import TARGETS

COMBINE = CombineSpec(128, 8, 2048, "bfloat16", "bfloat16", "float32")
needs_nvcc = pytest.mark.skipif(nvidia.nvcc() is None, reason="no nvcc")


@needs_nvcc
def test_the_second_compilation_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = TARGETS["cuda:sm_80"], Store(tmp_path)
    source = lowered(combine(COMBINE, target), target=target).source
    first = cubin(source, target, store)
    assert [entry.kind for entry in entries(store)] == [OBJECTS, OBJECTS]
    monkeypatch.setattr("moec.codegen.cuda.compiler.nvcc.compiled", None)
    assert cubin(source, target, store) == first
    assert first.registers > 0


def test_without_nvcc_and_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "nvcc", lambda: None)
    monkeypatch.setattr(nvidia, "nvrtc", lambda: None)
    words = (
        "target 'cuda:sm_80': there is neither nvcc nor NVRTC, and one of them must "
        "compile its kernels: "
        r"pip install 'moec\[cuda\]', or install the CUDA toolkit and set CUDA_HOME or PATH to it"
    )
    with pytest.raises(TargetError, match=words):
        cubin("", TARGETS["cuda:sm_80"], Store(None))


@needs_nvcc
def test_nvcc_that_fails() -> None:
    words = r"nvcc fails for sm_80: kernel.cu\(1\): error"
    with pytest.raises(TargetError, match=words):
        cubin("nothing", TARGETS["cuda:sm_80"], Store(None))
