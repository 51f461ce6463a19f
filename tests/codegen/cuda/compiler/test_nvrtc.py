"""NVRTC instead of nvcc: from wheels, without a toolkit and without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec.cache import OBJECTS, Store, entries
from moec.codegen.backends.cuda.backend import CUDA_TEXT, cubin
from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.specs.products import LinearSpec
from moec.errors import TargetError
from moec.target import nvidia
from moec.target.cuda import TARGETS
from tests.codegen.cuda.launches import grouped_linear_wgmma
from tests.cuda_emulator.models import emulated_model
from tests.models.families import FAMILIES

pytestmark = pytest.mark.skipif(
    nvidia.nvrtc() is None, reason="no NVRTC with CUDA's headers: pip install 'moec[cuda]'"
)


@pytest.fixture(autouse=True)
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "nvcc", lambda: None)


def test_a_family_is_compiled_and_its_source_is_that_of_the_emulator() -> None:
    family = FAMILIES["mixtral"]
    model, inputs = family.build(torch.float32), family.inputs(1, 5)
    compiled, text = (
        moec.compile(model, kwargs=inputs, target="cuda:sm_80,sm_90a", verify=False, **options)
        for options in ({}, {"backend": CUDA_TEXT})
    )
    package = compiled.package
    assert package is not None
    assert package.gpu is not None
    assert text.package is not None
    assert text.package.gpu is not None
    compiled_parts = package.gpu.parts.keys() - text.package.gpu.parts.keys()
    assert compiled_parts == {"sm_80.cubin", "sm_90a.cubin", "sm_90.ptx"}
    assert package.gpu.parts["sm_80.cu"] == text.package.gpu.parts["sm_80.cu"]
    assert package.gpu.toolkit.startswith("13.")
    for name in compiled_parts:
        content, arch = package.gpu.parts[name], name.partition(".")[0]
        start = b"\n.target sm_90\n" if name.endswith(".ptx") else b"\x7fELF"
        assert start in content[:500]
        assert all(launch.name.encode() in content for launch in package.gpu.launches[arch])
    values = {port.name: inputs[port.name] for port in package.main.inputs}
    with torch.no_grad():
        expected = model(**inputs).logits
    # float32: sums in another order.
    torch.testing.assert_close(
        emulated_model(package)(values).popitem()[1], expected, rtol=1e-4, atol=1e-5
    )


def test_tensor_maps_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC does not know the type of a tensor map; registers and spills are read as of nvcc."""
    target, store = TARGETS["cuda:sm_90a"], Store(tmp_path)
    kernel = grouped_linear_wgmma(LinearSpec(1536, 2048, "bfloat16", groups=128), target)
    source = lowered(kernel, target=target).source
    first = cubin(source, target, store)
    assert (first.registers, first.spills) == (168, 0)
    assert first.static_shared > 0
    assert [entry.kind for entry in entries(store)] == [OBJECTS, OBJECTS]
    monkeypatch.setattr("moec.codegen.cuda.compiler.nvrtc.compiled", None)
    assert cubin(source, target, store) == first


def test_nvrtc_that_fails() -> None:
    words = r"libnvrtc.so.\d+ fails for sm_80: kernel.cu\(1\): error"
    with pytest.raises(TargetError, match=words):
        cubin("nothing", TARGETS["cuda:sm_80"], Store(None))
