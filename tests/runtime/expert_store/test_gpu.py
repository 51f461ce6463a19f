"""Models whose experts are copied to a GPU compute the bits of models that are there.

TVM's runtime runs on a fake driver with streams that are late (tests/cuda_emulator/driver.c), and
kernels are emulated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moec
from tests.cuda_emulator.driver import environment_of, stand_in, write_driver
from tests.cuda_emulator.emulate import needs_compiler
from tests.once import Once

pytestmark = needs_compiler
LAYERS, EXPERTS = 2, 8
FORMATS = (None, "int4:32:asymmetric")
PART = "sm_90a.cubin"
PROGRAM = """
import ctypes
import numpy as np
import moec
from moec.model.load import LoadedModel
from moec.runtime.artifact.artifact import read
from moec.runtime.call.executor import start
from moec.runtime.device.gpu import GpuDevice
from moec.runtime.expert_store.start import (
    ONE_TEXT, TextRoom, resident_limit, start_on_gpu, store_report
)
from pathlib import Path
driver = ctypes.CDLL("libcuda.so.1")
IN_TIME, COPIES_LATE, KERNELS_LATE = range(3)
expected, opened = np.load("expected.npz"), read("model.moec")
ids, gpu = expected["ids"], GpuDevice(0, copies=True)
def logits(executor, ids):
    return executor({"input_ids": ids})["logits"].tobytes()
def text(executor, **options):
    return LoadedModel(Path("model.moec"), opened, executor).generate(ids[:, :5], **options)
def in_slots(slots):
    return start_on_gpu(opened, [slots] * 2, gpu)
"""


def artifact(once: Once, quant: str | None) -> Path:
    """A folder with a language model for GPUs, what eager computes, and the driver."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2,
            vocab_size=96, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.arange(24).reshape(2, 12) * 17 % 96
        compiled = moec.compile(
            model, (ids,), target="cuda:sm_90a", backend=stand_in(folder, PART), verify=False,
            store=True, quant=quant,
        )  # fmt: skip
        compiled.save(folder / "model.moec")
        with torch.no_grad():
            expected = model(ids).logits.float().numpy()
        np.savez(folder / "expected.npz", ids=ids.numpy(), logits=expected)
        write_driver(folder)

    return once(f"on-gpu-{str(quant).replace(':', '-')}", write)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, once) -> Path:
    return artifact(once, request.param)


@pytest.fixture(scope="module")
def plain(once) -> Path:
    return artifact(once, None)


def run(folder: Path, program: str, *words: str) -> str:
    command = [sys.executable, *(words or ("-c", PROGRAM + program))]
    environment = environment_of(folder)
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not result.returncode, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("late", ["COPIES_LATE", "KERNELS_LATE"])
def test_the_bits_do_not_depend_on_slots(folder: Path, late: str) -> None:
    """Of prompts and single tokens, with all experts in slots, half, a quarter, and one."""
    run(
        folder,
        "inputs = (ids, ids[:1, :1], ids[:1, :3], ids[:0], ids)\n"
        "full = start(opened, gpu)\n"
        "right = [logits(full, x) for x in inputs]\n"
        f"driver.be_late({late})\n"
        "for slots in (8, 4, 2, 1):\n"
        "    model = in_slots(slots)\n"
        "    assert [logits(model, x) for x in inputs] == right, slots\n",
    )


def test_logits_are_those_of_transformers(plain: Path) -> None:
    run(
        plain,
        "y = in_slots(2)({'input_ids': ids})['logits'].astype(np.float32)\n"
        "far = np.abs(y - expected['logits']).max() / np.abs(expected['logits']).max()\n"
        "assert far < 2e-2, far\n",
    )


def test_text_goes_on_as_with_all_experts_there(folder: Path) -> None:
    run(
        folder,
        "right = text(start(opened, gpu), max_new_tokens=4)\n"
        "driver.be_late(COPIES_LATE)\n"
        "assert (text(in_slots(2), max_new_tokens=4) == right).all()\n",
    )


def test_a_long_prompt_goes_by_wgmma(plain: Path) -> None:
    run(
        plain,
        "ids = np.random.default_rng(0).integers(96, size=(1, 160))\n"
        "right = logits(start(opened, gpu), ids)\n"
        "driver.be_late(KERNELS_LATE)\n"
        "assert logits(in_slots(2), ids) == right\n",
    )


def test_hits_and_bytes_are_counted(plain: Path) -> None:
    run(
        plain,
        "model = in_slots(8)\n"
        "logits(model, ids)\n"
        "report = store_report(model)\n"
        "first = report.counts\n"
        "assert report.reading == 'pinned' and report.slot_bytes == report.expert_bytes\n"
        "assert (first.calls, first.hits) == (2, 0), first\n"
        "each = report.expert_bytes // 16\n"
        "assert first.bytes_read == first.visits * each, first\n"
        "logits(model, ids)\n"
        "second = store_report(model).counts\n"
        "assert (second.hits, second.bytes_read) == (first.visits, first.bytes_read), second\n",
    )


def test_where_memory_cannot_be_pinned_the_file_is_copied_from(plain: Path) -> None:
    run(
        plain,
        "right = logits(start(opened, gpu), ids)\n"
        "ctypes.c_long.in_dll(driver, 'pinned_left').value = 200_000\n"
        "driver.be_late(COPIES_LATE)\n"
        "model = in_slots(2)\n"
        "assert logits(model, ids) == right\n"
        "assert store_report(model).reading == 'mapped'\n",
    )


LIMIT = (
    "free = resident_limit(opened, 1 << 40, ONE_TEXT)\n"
    "working, experts = 96 << 20, 8 * 2 * 3 * 64 * 64 * 2\n"
    "limit = free.resident + free.caches + working + experts // 2\n"
)


def test_a_limit_of_the_gpus_memory(plain: Path) -> None:
    """Half of the experts; where all of it fits there is no store."""
    run(
        plain,
        LIMIT + "model = moec.load('model.moec', device='cuda', copies=True, memory=limit)\n"
        "assert store_report(model.executor).slots == (4, 4)\n"
        "assert logits(model.executor, ids) == logits(start(opened, gpu), ids)\n"
        "full = moec.load('model.moec', device='cuda', copies=True, memory=limit + experts)\n"
        "assert store_report(full.executor) is None\n",
    )


def test_limits_that_are_too_small_are_one_sentence(plain: Path) -> None:
    run(
        plain,
        LIMIT + "from moec.errors import InputError, UsageError\n"
        "try:\n"
        "    moec.load('model.moec', device='cuda', copies=True, memory=50_000_000)\n"
        "    raise SystemExit('no error')\n"
        "except UsageError as error:\n"
        "    assert 'memory is 50.0 MB, and this model needs 10' in str(error), error\n"
        "less = free.caches - resident_limit(opened, 1 << 40, TextRoom(1, 16)).caches\n"
        "options = {'device': 'cuda', 'copies': True, 'memory': limit - less, 'room': 16}\n"
        "model = moec.load('model.moec', **options)\n"
        "try:\n"
        "    model.generate(ids, max_new_tokens=9)\n"
        "    raise SystemExit('no error')\n"
        "except InputError as error:\n"
        "    assert 'give fewer or shorter texts at once' in str(error), error\n",
    )


def test_a_failure_of_cuda_is_one_sentence(plain: Path) -> None:
    run(
        plain,
        "from moec.errors import TargetError\n"
        "model = in_slots(2)\n"
        "right = logits(start(opened, gpu), ids)\n"
        "ctypes.c_int.in_dll(driver, 'copies_left').value = 6\n"
        "try:\n"
        "    logits(model, ids)\n"
        "    raise SystemExit('no error')\n"
        "except TargetError as error:\n"
        "    assert 'GPU 0 failed: CUDA: experts cannot be copied' in str(error), error\n"
        "ctypes.c_int.in_dll(driver, 'copies_left').value = 1 << 30\n"
        "assert logits(model, ids) == right\n",
    )


def test_the_command_line(plain: Path) -> None:
    limit = run(plain, LIMIT + "print(limit / 1e6, end='MB')")
    np.save(plain / "expected.npy", np.load(plain / "expected.npz")["ids"])
    words = ["run", "model.moec", "--device", "cuda:0", "--memory", limit]
    answer = json.loads(run(plain, "", "-m", "moec", *words, "--input", "expected.npy", "--json"))
    assert answer["store"]["slots"] == [EXPERTS // 2] * LAYERS
    assert answer["store"]["reading"] == "pinned"
