"""TVM's own CUDA runtime with a fake driver: memory, launches, streams, graphs.

The test process loads libcuda and libcudart from tests/cuda_emulator/driver.c, whose GPU is the
CPU; kernels are emulated.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moec
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from tests.cuda_emulator.driver import for_stand_in, write_driver

VOCABULARY, D, HEADS = 16, 8, 2


class Attention(nn.Module):
    """The least that continues text: embedding, attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        shape = (*input_ids.shape, HEADS, D // HEADS)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        rows = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + rows.transpose(1, 2).flatten(2))


PROGRAM = """
import ctypes
import numpy as np
import moec
driver = ctypes.CDLL("libcuda.so.1")
ALLOCATIONS, WAITS, LAUNCHES, COPIES, OTHER_STREAMS, HOST_COPIES, GRAPHS = range(7)
counts = (ctypes.c_long * 7).in_dll(driver, "counts")
expected = np.load("expected.npz")
ids = expected["ids"]
model = moec.load("model.moec", device="cuda", copies=True)
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with an artifact and its expected results, and the environment to run it in."""
    folder = tmp_path_factory.mktemp("stand-in")
    torch.manual_seed(0)
    model, ids = Attention().eval(), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    compiled = moec.compile(
        model, (ids,), target="cpu,cuda:sm_90a", backend=CUDA_TEXT, verify=False
    )
    assert compiled.for_gpu is not None
    tokens = compiled.generate(ids.numpy(), max_new_tokens=6)
    on_gpu = for_stand_in(compiled.for_gpu, folder, "sm_90a.cubin")
    replace(compiled, for_gpu=on_gpu).save(folder / "model.moec")
    with torch.no_grad():
        logits = model(ids).numpy()
    np.savez(folder / "expected.npz", ids=ids.numpy(), logits=logits, tokens=tokens)
    return folder, write_driver(folder)


def run(process: tuple[Path, dict[str, str]], program: str) -> None:
    folder, environment = process
    words = [sys.executable, "-c", PROGRAM + program]
    result = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not result.returncode, result.stderr


def test_inputs_are_copied_there_and_results_back(process: tuple[Path, dict[str, str]]) -> None:
    run(
        process,
        "driver.count_from_zero(None)\n"
        "logits = model(ids)\n"
        "np.testing.assert_allclose(logits, expected['logits'], rtol=1e-4, atol=1e-5)\n"
        "assert counts[LAUNCHES] and not counts[OTHER_STREAMS], list(counts)\n",
    )


def test_text_goes_on_with_caches_on_the_gpu(process: tuple[Path, dict[str, str]]) -> None:
    """The tokens of the CPU's code; a token copies its four inputs there and its logits back, and
    allocates nothing once the first has."""
    run(
        process,
        "tokens = model.generate(ids, max_new_tokens=6)\n"
        "assert (tokens == expected['tokens']).all(), tokens\n"
        "from moec.runtime.text.texts import Texts\n"
        "texts = Texts(model.executor, 2, room=9)\n"
        "texts.feed(ids[:, :3].tolist())\n"
        "texts.feed(ids[:, 3:4].tolist())\n"
        "driver.count_from_zero(None)\n"
        "logits = texts.feed(ids[:, 4:5].tolist())\n"
        "np.testing.assert_allclose(logits, expected['logits'][:, 4], rtol=1e-4, atol=1e-5)\n"
        "assert counts[COPIES] == 5, list(counts)\n"
        "assert not counts[ALLOCATIONS], list(counts)\n",
    )


def test_tokens_are_launched_kernel_by_kernel(process: tuple[Path, dict[str, str]]) -> None:
    """No graph is captured, and further tokens allocate nothing."""
    run(
        process,
        "from moec.runtime.text.texts import Texts\n"
        "executor = model.executor\n"
        "def check(step):\n"
        "    driver.count_from_zero(None)\n"
        "    logits = texts.feed(ids[:, step:step + 1].tolist())\n"
        "    close = np.testing.assert_allclose\n"
        "    close(logits, expected['logits'][:, step], rtol=1e-4, atol=1e-5)\n"
        "    assert (counts[LAUNCHES] > 0, counts[GRAPHS]) == (True, 0), list(counts)\n"
        "for _ in range(2):\n"
        "    texts = Texts(executor, 2, room=9)\n"
        "    texts.feed(ids[:, :1].tolist())\n"
        "    for step in (1, 2, 3):\n"
        "        check(step)\n"
        "texts.feed(ids[:, 4:5].tolist())\n"
        "assert counts[ALLOCATIONS] == 0, list(counts)\n",
    )


def test_a_warm_call_may_be_captured(process: tuple[Path, dict[str, str]]) -> None:
    """As in torch.cuda.graph, with results in memory of the caller (torch's, which this process
    does not have), where kernels write them: no allocation, no wait, no copy, one stream."""
    run(
        process,
        "import moec.runtime.device.gpu as gpu\n"
        "from moec.runtime.device.library import tvm_ffi\n"
        "from moec.runtime.device.tensors import from_numpy, results_of, to_numpy\n"
        "ffi, cudart, stream = tvm_ffi(), ctypes.CDLL('libcudart.so.13'), ctypes.c_void_p(4096)\n"
        "executor, device = model.executor, gpu.GpuDevice()\n"
        "entry, (port,) = executor._main, executor._main.signature.outputs\n"
        "x = device.moved(from_numpy(ids))\n"
        "memory = device.moved(from_numpy(np.zeros_like(expected['logits'])))\n"
        "gpu.empty_in_torch = lambda *_: memory\n"
        "shape = expected['logits'].shape\n"
        "def call():\n"
        "    to = device.destination(port, shape, None)\n"
        "    raw = results_of(entry.function(x, to, *entry.params), 1)\n"
        "    return device.results(raw, {0: to})[0]\n"
        "call(), call()\n"
        "driver.count_from_zero(stream)\n"
        "graph = ctypes.c_void_p()\n"
        "with ffi.use_raw_stream(ffi.device('cuda:0'), stream.value):\n"
        "    cudart.cudaStreamBeginCapture(stream, 0)\n"
        "    result = call()\n"
        "    cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))\n"
        "kinds = (ALLOCATIONS, WAITS, COPIES, OTHER_STREAMS)\n"
        "assert counts[LAUNCHES] and not any(counts[kind] for kind in kinds), list(counts)\n"
        "device.moved(from_numpy(ids[:, ::-1].copy()), x)\n"
        "backwards = model(ids[:, ::-1].copy())\n"
        "cudart.cudaGraphLaunch(graph, stream)\n"
        "assert result.data_ptr() == memory.data_ptr()\n"
        "np.testing.assert_array_equal(to_numpy(device.to_host(result), port), backwards)\n",
    )


def test_other_results_are_copied_on_the_stream_of_the_call(
    process: tuple[Path, dict[str, str]],
) -> None:
    run(
        process,
        "import moec.runtime.device.gpu as gpu\n"
        "from moec.runtime.device.library import tvm_ffi\n"
        "from moec.runtime.device.tensors import from_numpy\n"
        "ffi, device = tvm_ffi(), gpu.GpuDevice()\n"
        "x, memory = (device.moved(from_numpy(array)) for array in (ids, np.zeros_like(ids)))\n"
        "gpu.empty_in_torch = lambda *_: memory\n"
        "driver.count_from_zero(ctypes.c_void_p(4096))\n"
        "with ffi.use_raw_stream(ffi.device('cuda:0'), 4096):\n"
        "    (result,) = device.results([x], {})\n"
        "assert (counts[COPIES], counts[HOST_COPIES], counts[OTHER_STREAMS]) == (1, 0, 0)\n"
        "np.testing.assert_array_equal(np.from_dlpack(device.to_host(result)), ids)\n",
    )


def test_calls_with_copies_write_into_one_memory(process: tuple[Path, dict[str, str]]) -> None:
    """Whose results are in memory of the CPU: a warm call allocates its input alone."""
    run(
        process,
        "first = model(ids)\n"
        "model(ids)\n"
        "(latest,) = model.executor._main.memory\n"
        "driver.count_from_zero(None)\n"
        "second = model(ids[:, ::-1].copy())\n"
        "assert counts[ALLOCATIONS] <= 1, list(counts)\n"
        "assert model.executor._main.memory[0] is latest\n"
        "np.testing.assert_allclose(first, expected['logits'], rtol=1e-4, atol=1e-5)\n"
        "assert np.abs(second - first).max() > 1e-3\n",
    )


def test_a_token_can_be_captured_in_a_graph(process: tuple[Path, dict[str, str]]) -> None:
    """A step allocates nothing, waits for nothing and stays on its stream, and what its launches
    are given is the same for every token: the graph of one computes the next."""
    run(
        process,
        "from moec.runtime.device.library import tvm_ffi\n"
        "from moec.runtime.device.tensors import from_numpy, to_numpy\n"
        "from moec.runtime.text.texts import Texts\n"
        "ffi, cudart, stream = tvm_ffi(), ctypes.CDLL('libcudart.so.13'), ctypes.c_void_p(4096)\n"
        "executor = model.executor\n"
        "texts = Texts(executor, 2, room=9)\n"
        "for start, stop in ((0, 2), (2, 3), (3, 4)):\n"
        "    texts.feed(ids[:, start:stop].tolist())\n"
        "entry, inputs = executor._entries['decode'], executor._counts\n"
        "caches = [cache.tensor for cache in texts._caches]\n"
        "driver.count_from_zero(stream)\n"
        "graph = ctypes.c_void_p()\n"
        "with ffi.use_raw_stream(ffi.device('cuda:0'), stream.value):\n"
        "    cudart.cudaStreamBeginCapture(stream, 0)\n"
        "    results = entry.function(*inputs, *caches, *entry.params)\n"
        "    cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))\n"
        "assert counts[LAUNCHES], list(counts)\n"
        "refused = (counts[ALLOCATIONS], counts[WAITS], counts[COPIES], counts[OTHER_STREAMS])\n"
        "assert not any(refused), list(counts)\n"
        "steps = [ids[:, 4:5].copy(), np.full(2, 4), np.arange(2), np.full(2, 4)]\n"
        "for step, to in zip(steps, inputs):\n"
        "    executor.device.moved(from_numpy(step), to)\n"
        "cudart.cudaGraphLaunch(graph, stream)\n"
        "item = ffi.get_global_func('ffi.ArrayGetItem')\n"
        "(port,) = entry.signature.outputs\n"
        "logits = to_numpy(executor.device.to_host(item(results, 0)), port)[:, 0]\n"
        "np.testing.assert_allclose(logits, expected['logits'][:, 4], rtol=1e-4, atol=1e-5)\n",
    )


def test_where_there_is_a_gpu_tvm_compiles_nothing(process: tuple[Path, dict[str, str]]) -> None:
    """With a driver, TVM's code generator would call NVRTC of a package that moec does not need."""
    _, environment = process
    program = (
        "from moec.codegen.cuda.routing.dispatch import combine\n"
        "from moec.codegen.cuda.compiler.source import lowered\n"
        "from moec.codegen.specs.routing import CombineSpec\n"
        "from moec.target.cuda import TARGETS\n"
        "import tvm\n"
        "assert tvm.get_global_func('ffi.Module.create.cuda', allow_missing=True)\n"
        "before = tvm.get_global_func('tvm_callback_cuda_compile')\n"
        "target = TARGETS['cuda:sm_90a']\n"
        "kernel = combine(CombineSpec(4, 2, 8, 'float32', 'float32', 'float32'), target)\n"
        "assert '__global__' in lowered(kernel, target=target).source\n"
        "assert tvm.get_global_func('tvm_callback_cuda_compile').same_as(before)\n"
    )
    words = [sys.executable, "-c", program]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr


def test_tensor_maps_are_passed_by_value(tmp_path: Path) -> None:
    """A product by wgmma: TVM must know which arguments are tensor maps."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64, dtype=torch.bfloat16).eval(), torch.randn(40, 64).bfloat16()
    target = "cpu,cuda:sm_90a"
    compiled = moec.compile(linear, (x,), target=target, backend=CUDA_TEXT, verify=False)
    assert compiled.for_gpu is not None
    on_gpu = for_stand_in(compiled.for_gpu, tmp_path, "sm_90a.cubin")
    replace(compiled, for_gpu=on_gpu).save(tmp_path / "model.moec")
    with torch.no_grad():
        expected = linear(x).float().numpy()
    np.savez(tmp_path / "expected.npz", ids=x.view(torch.int16).numpy(), y=expected)
    run(
        (tmp_path, write_driver(tmp_path)),
        "import torch\n"
        "y = model(torch.from_numpy(ids).view(torch.bfloat16))\n"
        "close = np.testing.assert_allclose\n"
        "close(torch.as_tensor(y).float().numpy(), expected['y'], atol=0.03)\n"
        "assert any('tensormap' in launch.arguments for launch in\n"
        "           model.executor.package.gpu.launches['sm_90a'])\n",
    )
