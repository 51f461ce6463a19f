"""Ranks on GPUs without a GPU: emulated kernels under TVM's own CUDA runtime and a fake driver.

The stand-in for a GPU takes tensors of the CPU, so ranks exchange them by gloo. What runs is what
`moec compile --plan --target cuda:…` writes; what chooses NCCL is tested beside it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3MoeForCausalLM

from moec.codegen.backends.cuda import backend
from moec.errors import ArtifactError, TargetError, UsageError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.ranks import side_by_side
from moec.ir.ops import OPS
from moec.parallel.compile import compile_function
from moec.parallel.process import Job, started
from moec.parallel.process_ranks import device_of_rank, start_group
from moec.parallel.segments import RankModel
from moec.parallel.store import gpu_file, load_rank, manifest_of, verify_folder
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.groups import groups_of
from moec.runtime.device.device import Cpu, device_of
from moec.runtime.device.gpu import GpuDevice
from moec.runtime.package import DECODE, MAIN
from moec.target.named import parse_for_ranks
from tests.command_line import invoke
from tests.cuda_emulator.driver import stand_in, write_driver
from tests.cuda_emulator.models import EmulatedGpu
from tests.once import Once
from tests.parallel.test_start import as_rank
from tests.parallel.test_text import cli, folder
from tests.passes.parallel.test_plan_parallelism import FORMS, D, model

__all__ = ["folder"]  # a fixture

TARGET = "cuda:sm_80,sm_90a"
PROMPTS = [[5, 9, 12, 7, 33], [100, 3], [64]]  # two on rank 0, one on rank 1
TOKENS = 4
FORMS_OF_RANKS = ("flat", "slices", "rail", "hierarchical", "deduplicated")
RANK = f"""
import ctypes, json, os, sys
from pathlib import Path
from moec.parallel import process
from moec.parallel.decoder import RankDecoder
from moec.parallel.store import load_rank
from moec.parallel.worker import outputs_of
from moec.runtime.device.device import device_of
from moec.runtime.package import DECODE
from moec.runtime.text.generate import generate
from moec.runtime.text.request import Request

launches = (ctypes.c_long * 3).in_dll(ctypes.CDLL("libcuda.so.1"), "counts")

def stand_in(target):
    assert target == "{TARGET}", target
    return device_of("cuda:" + os.environ["LOCAL_RANK"], copies=True)

process.device_of_rank = stand_in
job = process.Job(Path(sys.argv[1]), Path("in.npz"), None, 300.0, 1)
with process.joined(job, DECODE) as (ranks, files):
    tokens = list(generate(RankDecoder(files, ranks), {PROMPTS}, Request({TOKENS})))
    of_text = launches[2]
    outputs = outputs_of(job, ranks, load_rank(job.folder, ranks.rank))
    assert 0 < of_text < launches[2], list(launches)
if ranks.rank == 0:
    logits = outputs["logits"].tolist()
    Path("out.json").write_text(json.dumps({{"tokens": tokens, "logits": logits}}))
"""


@pytest.fixture(scope="session")
def on_gpus(folder: Path, once: Once) -> Path:
    """The ranks of the model of `folder`, whose attention is split too."""

    def fill(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "CUDA", stand_in(path, "sm_90a.cubin"))
            words = ["--plan", str(folder / "plan.json"), "-o", str(path / "two.ranks")]
            words += ["--target", TARGET, "--verify", "off"]
            assert "not as planned" not in cli("compile", str(folder / "model"), *words).output

    return once("gpus", fill) / "two.ranks"


def test_tokens_and_logits_of_transformers(on_gpus: Path, folder: Path, tmp_path: Path) -> None:
    """Two ranks, each on its GPU, by torchrun. Both functions: text, and the model as it is."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(15).reshape(3, 5)
    np.savez(tmp_path / "in.npz", input_ids=ids.numpy())
    (tmp_path / "rank.py").write_text(RANK)
    words = ["--nproc-per-node", "2", "--log-dir", str(tmp_path), "rank.py", str(on_gpus)]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=tmp_path, env=write_driver(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not process.returncode, process.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    for prompt, *tokens in zip(PROMPTS, *result["tokens"], strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    with torch.no_grad():
        right = model(ids).logits.numpy()
    # Sums over a hidden width of 32 in another order.
    np.testing.assert_allclose(np.array(result["logits"]), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS_OF_RANKS)
def test_every_form_of_exchange(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks as threads, one of which has no rows, on emulated kernels; beside the graph before it
    was split, in torch."""
    monkeypatch.setattr(backend, "CUDA", backend.CUDA_TEXT)
    program, p = model(), FORMS[form]
    ranks = rank_programs(program, p)
    programs = [ranks[f"rank.{rank}.main"] for rank in range(p.devices)]
    codes = compile_function(programs, MAIN, parse_for_ranks("cuda:sm_80"))
    models = [RankModel(code, EmulatedGpu()) for code in codes]
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    parts = x.split([2, 0, 4, 1])
    results = side_by_side(
        p.devices, groups_of(p), lambda rank, table: models[rank]([parts[rank]], table)[0]
    )
    (expected,) = evaluate(program.graph, [x], program.weights)
    torch.testing.assert_close(torch.cat(results), expected, rtol=1e-5, atol=1e-5)


def test_a_rank_has_its_kernels(on_gpus: Path, tmp_path: Path) -> None:
    assert manifest_of(on_gpus)[0].target == TARGET
    for function in (MAIN, DECODE):
        code = load_rank(on_gpus, 1, function).code.package.gpu
        assert code is not None
        assert code.target == TARGET
        assert {"sm_90a.cu", "sm_90a.so", "sm_90a.cubin"} <= code.parts.keys()
    verify_folder(on_gpus)
    copy = Path(shutil.copytree(on_gpus, tmp_path / "m.ranks"))
    name = gpu_file(1, DECODE, "sm_90a.cubin")
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        load_rank(copy, 1, DECODE)


def test_another_folder_than_its_ranks(two_ranks: Path, tmp_path: Path) -> None:
    """Also one of a version without the target."""
    copy = Path(shutil.copytree(two_ranks, tmp_path / "m.ranks"))
    fields = json.loads((copy / "ranks.json").read_text())
    (copy / "ranks.json").write_text(json.dumps({**fields, "target": TARGET}))
    with pytest.raises(ArtifactError, match=f"is for {TARGET}, and rank 0 for {fields['target']}"):
        load_rank(copy, 0)
    del fields["target"]
    (copy / "ranks.json").write_text(json.dumps({**fields, "version": 3}))
    with pytest.raises(ArtifactError, match="was written by another version of moec"):
        load_rank(copy, 0)


# ---- the device chooses how rows are exchanged ---------------------------------------------


def test_gpus_exchange_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own objects go to the rank's GPU; tensors of the CPU go by gloo."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda name, *, timeout, device_id: calls.append((name, device_id)),
    )
    for device in (device_of("cuda:1"), device_of("cuda:1", copies=True), Cpu()):
        start_group(device, timedelta(seconds=1))
    gpu = torch.device("cuda:1")
    assert calls == [gpu, ("nccl", gpu), ("gloo", None), ("gloo", None)]


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device_of_rank("avx2"), Cpu)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UsageError, match="LOCAL_RANK, the number of a rank's GPU, is not set"):
        device_of_rank(TARGET)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TargetError, match="no GPU 1: each rank of a host needs one, and this one"):
        device_of_rank(TARGET)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_rank(TARGET) == GpuDevice(1, copies=False)


def test_a_torch_without_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything waits for another rank."""
    as_rank(monkeypatch, 0, 2, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    words = f"for {TARGET} and exchange rows by NCCL, which this build of torch lacks: install"
    with (
        pytest.raises(TargetError, match=words),
        started(Job(tmp_path, None, None, 300.0, 1, marks=tmp_path), TARGET),
    ):
        pass
    assert (tmp_path / "rank.0.failed").read_text().startswith("rank 0: the ranks are compiled")


SIZES = {"rows": 6, "other": 9, "parts": (1, 2)}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("dist.assign", ((4, 2), (6,), (8,))),
        ("dist.first_of", ((4, 2),)),
        ("dist.slot_of", ((3,),)),
        ("dist.row_count", ((4, 2),)),
        ("dist.counts", ((3,),)),
    ],
)
def test_what_torch_computes_stays_on_its_device(name: str, shapes: Any) -> None:
    """Another device than the CPU: tensors without memory."""
    tensors = [torch.zeros(shape, dtype=torch.int64, device="meta") for shape in shapes]
    result = OPS[name].reference(None, tensors, SIZES, None)  # type: ignore[arg-type]
    assert result.device.type == "meta"


@pytest.mark.parametrize(
    ("target", "more", "words"),
    [
        ("cpu,cuda:sm_80", (), "the ranks of a plan run all on CPUs of this machine's kind"),
        ("avx2", (), "the ranks of a plan run all on CPUs of this machine's kind"),
        ("cpu", ("--quant", "int8"), "--plan accepts only MODEL, -o, --target and --verify"),
        ("cpu", ("--memory", "1GiB"), "--plan accepts only MODEL, -o, --target and --verify"),
        ("cpu", ("--no-kv-cache",), "--plan accepts only MODEL, -o, --target and --verify"),
        ("cuda:sm_80", ("--emit", "code"), "--plan accepts only MODEL, -o, --target and --verify"),
    ],
)
def test_refusals(target: str, more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    options = ["--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "m.ranks"), *more]
    result = invoke("compile", f"{__file__}:model", *options, "--target", target)
    assert result.exit_code == 2
    assert words in result.stderr
