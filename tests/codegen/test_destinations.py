"""Results that kernels write into memory of the caller."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.errors import ArtifactError, InputError
from moec.runtime.artifact import artifact
from moec.runtime.call.executor import Executor
from moec.runtime.package import Port
from tests.cuda_emulator.models import EmulatedGpu


class Layers(nn.Module):
    """Results of all kinds: of products, of loops, shared, inputs, a weight, of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.up(x).relu()
        best = torch.topk(y, 2)
        length = int(y.argmax())
        torch._check(length >= 0)
        return {
            "down": self.down(y),  # a product of rows, seen as [B, S, 4]
            "values": best.values,  # one of two results of a kernel
            "y": y,
            "flat": y.view(-1),
            "x": x,
            "weight": self.down.bias,
            "counted": torch.arange(length) + 1,
        }


@dataclass
class Spy(EmulatedGpu):
    """Keeps the memory of each call."""

    memory: list[Any] = field(default_factory=list)

    def destination(self, port: Port, shape: tuple[int, ...], before: Any) -> Any:
        self.memory.append(super().destination(port, shape, before))
        return self.memory[-1]


@pytest.fixture(scope="module")
def compiled() -> tuple[Layers, moec.CompiledModel]:
    torch.manual_seed(0)
    model = Layers().eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    return model, moec.compile(
        model, (x,), target="cpu,cuda:sm_80", backend=CUDA_TEXT, verify=False
    )


def test_results_with_memory_of_their_own_and_known_sizes(
    compiled: tuple[Layers, moec.CompiledModel],
) -> None:
    _, model = compiled
    assert model.for_gpu is not None
    assert model.for_gpu.main.destinations == ("down", "values")
    assert model.package is not None
    assert model.package.main.destinations == ()  # results of a CPU are not copied anyway


def test_kernels_write_into_that_memory(compiled: tuple[Layers, moec.CompiledModel]) -> None:
    model, on_gpu = compiled
    assert on_gpu.for_gpu is not None
    executor = Executor(on_gpu.for_gpu, device=(spy := Spy()))
    for batch in (2, 2, 5):
        x = torch.randn(batch, 3, 8)
        results = executor({"x": x})
        with torch.no_grad():
            expected = model(x)
        for result, tensor in zip(results.values(), expected.values(), strict=True):
            torch.testing.assert_close(result, tensor, rtol=1e-5, atol=1e-6)
        memory = [tensor.data_ptr() for tensor in spy.memory]
        assert [results[name].data_ptr() for name in ("down", "values")] == memory
        spy.memory.clear()


def test_shapes_that_do_not_fit_are_refused_before_memory_is_allocated(
    compiled: tuple[Layers, moec.CompiledModel],
) -> None:
    _, model = compiled
    assert model.for_gpu is not None
    executor = Executor(model.for_gpu, device=(spy := Spy()))
    with pytest.raises(InputError, match=r"axis 2 of input 'x' is 9, expected 8"):
        executor.run([torch.zeros(2, 3, 9)])
    assert not spy.memory


def test_a_manifest_that_passes_memory_for_no_output(
    compiled: tuple[Layers, moec.CompiledModel], tmp_path: Any
) -> None:
    _, model = compiled
    package = model.for_gpu
    assert package is not None
    forged = replace(package, functions={"main": replace(package.main, destinations=("z",))})
    artifact.write(forged, tmp_path / "forged.moec", graphs={})
    with pytest.raises(ArtifactError, match="memory is passed for what is no output"):
        artifact.read(tmp_path / "forged.moec")
