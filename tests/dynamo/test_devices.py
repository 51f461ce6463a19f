"""Graphs with tensors on GPUs, without a GPU: their targets, and blocks on emulated kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.dynamo.compiler import ON_GPU, backend, on_devices
from moec.dynamo.operators import BlockSite, register_site
from moec.dynamo.options import parse
from moec.dynamo.record import FallbackError, FallbackWarning
from moec.dynamo.training.gradients import IN_PYTORCH
from moec.errors import NoMatch, TargetError
from moec.target import nvidia
from tests.cuda_emulator.models import EmulatedGpu
from tests.dynamo.modules import Gathered

WORDS = "its tensors are on meta, and there are kernels for CPUs and NVIDIA GPUs"
GPUS = tuple(nvidia.Gpu(name, at, 80 << 30) for name, at in (("A100", (8, 0)), ("H100", (9, 0))))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A driver with two GPUs."""
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("13.0", GPUS))
    return monkeypatch


def test_a_model_elsewhere_runs_as_it_is_and_is_counted() -> None:
    model = torch.compile(Gathered().to("meta"), backend="moec", options={"rest": "eager"})
    with torch.no_grad(), pytest.warns(FallbackWarning, match=WORDS):
        y = model(torch.empty(3, 16, device="meta"))
    assert (y.shape, y.device.type) == ((3, 16), "meta")
    stats = moec.stats()
    assert (stats.compilations, stats.blocks) == (1, 0)
    (fallback,) = stats.fallbacks
    assert fallback.where == "the graph"


def on_gpu(device: str = "cuda:1") -> fx.GraphModule:
    """What Dynamo captures of a router on a GPU, which this machine need not have."""
    graph = fx.Graph()
    choice = graph.call_function(torch.topk, (graph.placeholder("logits"), 2))
    graph.output(choice)
    mode = FakeTensorMode()
    parts = (torch.empty(3, 2, device="meta"), torch.empty(3, 2, device="meta"))
    choice.meta["example_value"] = tuple(
        FakeTensor(mode, part, torch.device(device)) for part in parts
    )
    return fx.GraphModule(torch.nn.Module(), graph)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: None)
    with pytest.warns(FallbackWarning, match="there is no NVIDIA driver here"):
        run = backend(on_gpu(), [torch.randn(3, 4)], options={"rest": "eager"})
    assert len(run(torch.randn(3, 4))) == 2
    with pytest.raises(FallbackError, match="there is no NVIDIA driver here"):
        backend(on_gpu(), [torch.randn(3, 4)], options={"rest": "eager", "strict": True})


@pytest.mark.usefixtures("driver")
def test_the_target_is_that_of_the_tensors_gpu() -> None:
    options = parse(None, None)
    for device, name in (("cuda:0", "cuda:sm_80"), ("cuda:1", "cuda:sm_90a")):
        settings, on = on_devices(options, {device})
        assert settings.target is not None
        assert (settings.target.name, on) == (name, device)
    settings, on = on_devices(options, {"cpu"})
    assert settings.target == parse({"target": "cpu"}, None).target
    assert on == "cpu"


@pytest.mark.usefixtures("driver")
def test_devices_that_do_not_fit() -> None:
    with pytest.raises(NoMatch, match="on cpu and cuda:0: those of a block must be on one device"):
        on_devices(parse(None, None), {"cpu", "cuda:0"})
    with pytest.raises(NoMatch, match="on cuda:0, and the target 'generic' of the options is for"):
        on_devices(parse({"target": "generic"}, None), {"cuda:0"})
    with pytest.raises(TargetError, match="there is no GPU 2: this machine has 2"):
        on_devices(parse(None, None), {"cuda:2"})


# ---- blocks on emulated kernels -------------------------------------------------------------


@pytest.fixture
def sites(driver: pytest.MonkeyPatch) -> list[BlockSite]:
    """The sites of the test, in which tensors of the CPU count as those of GPU 1, whose kernels are
    emulated."""
    registered: list[BlockSite] = []

    def register(*arguments: Any, **options: Any) -> BlockSite:
        registered.append(register_site(*arguments, **options))
        return registered[-1]

    driver.setattr("moec.dynamo.compiler.register_site", register)
    driver.setattr("moec.dynamo.compiler.devices_of", lambda nodes: {"cuda:1"})
    driver.setattr("moec.dynamo.code.backend_for", lambda target: CUDA_TEXT)
    driver.setattr("moec.dynamo.operators.device_of", lambda name: EmulatedGpu())
    return registered


def test_a_block_runs_on_the_kernels_of_its_gpu(sites: list[BlockSite]) -> None:
    """Also after a weight changed; weights that no kernel packs are read where PyTorch has them."""
    torch.manual_seed(0)
    module = Gathered().requires_grad_(False)
    model = torch.compile(module, backend="moec", options={"rest": "eager", "strict": True})
    x = torch.randn(5, 16)
    for _ in range(2):
        torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)
        module.up.mul_(1.5)
    stats = moec.stats()
    assert (stats.compilations, stats.blocks, stats.packs) == (1, 1, 2)
    (site,) = sites
    assert site.device == "cuda:1"
    assert site.latest is not None
    arrays = site.latest.packed.arrays.values()
    shared = {array.data_ptr() for array in arrays if torch.is_tensor(array)}
    assert module.down.data_ptr() in shared


# ---- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [[3, 3, 11], [0, 0, 0], [12, 12, 12]])
def test_products_of_a_gpu_equal_those_of_one_expert_at_a_time(
    ends: list[int], transposed: bool
) -> None:
    """bf16, on the CPU: the same rounding of one sum."""
    bf16, limits = torch.bfloat16, torch.tensor(ends, dtype=torch.int32)
    rows, grad = torch.randn(12, 16).to(bf16), torch.randn(12, 8).to(bf16)
    w, b = torch.randn(3, 8, 16).to(bf16), torch.randn(3, 8).to(bf16)
    w = w.mT.contiguous().mT if transposed else w
    near: Any = {"rtol": 2e-2, "atol": 2e-2}

    def compare(name: str, *arguments: Any) -> None:
        result, expected = (getattr(way, name)(*arguments) for way in (ON_GPU, IN_PYTORCH))
        torch.testing.assert_close(result, expected, **near)
        assert result.stride() == expected.stride()

    compare("product", rows, limits, w, None)
    compare("product", rows, limits, w, b)
    compare("mixed", grad, limits, w)
    compare("outer", grad, rows, limits, w)


def test_training_stays_on_the_gpu(sites: list[BlockSite]) -> None:
    """On tensors without memory, no operator of a block and its gradient makes a tensor of the CPU,
    or reads a routing on the host."""
    module = Gathered().bfloat16()
    model = torch.compile(module, backend="moec", options={"rest": "eager", "strict": True})
    model(torch.randn(5, 16).bfloat16()).sum().backward()
    (site,) = sites
    assert site.products is ON_GPU
    graph = site.code.expanded
    shapes = [[d if isinstance(d, int) else 5 for d in v.shape] for v in graph.inputs]
    shapes += [list(map(int, value.shape)) for value in graph.params]
    meta: Any = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    tensors = [torch.empty(shape, **meta) for shape in shapes]
    y = site.differentiable(tensors)
    gradients = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert {gradient.device.type for gradient in (y, *gradients)} == {"meta"}
