"""torch.compile(backend="moec") on two ranks: DDP, FSDP2 and transformers' expert parallelism."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moec
from tests.dynamo.modules import Model
from tests.fresh import Program, Warm
from tests.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("ddp", "fsdp", "experts")
Counts = dict[str, Any]


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="moec", options={"rest": "eager", "strict": True})


def trained(rank: int, spread: Any) -> None:
    """The gradients of two ranks with half of the batch each are those of all of it."""
    torch.manual_seed(0)
    model = Model()
    alone = copy.deepcopy(model)
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(3))
    run = compiled(spread(model))  # DDP sums gradients as long as it lives
    run(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    alone(x).square().mean().backward()
    for param, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert param.grad is not None
        grad: Any = param.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        # float32 sums over 20 tokens in another order
        torch.testing.assert_close(grad, right.grad, rtol=1e-4, atol=1e-6)


def ddp(rank: int) -> None:
    trained(rank, nn.parallel.DistributedDataParallel)


def fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    trained(rank, lambda model: fully_shard(model, mesh=mesh))


def experts(rank: int) -> None:
    """Each rank has two of four experts; an id of 2 is the sentinel of a choice elsewhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    family = FAMILIES["mixtral"].one_layer()
    alone, model, mesh = family.build(), family.build(), init_device_mesh("cpu", (2,))
    where = "model.layers.0.mlp.experts"
    weights = {f"{where}.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
    apply_expert_parallelism(model, mesh, mesh, {**weights, where: "ep_dispatch_experts"})
    inputs = family.inputs(2, 7)
    with torch.no_grad():
        logits = compiled(moec.prepare(model))(**inputs).logits
        # float32 through one layer whose sums are in another order
        torch.testing.assert_close(logits, alone(**inputs).logits, rtol=1e-4, atol=1e-5)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    counts: dict[str, Counts] = {}
    try:
        for name in KINDS:
            before = moec.stats().blocks
            globals()[name](rank)
            torch._dynamo.reset()
            stats = moec.stats()
            counts[name] = {"blocks": stats.blocks - before, "fallbacks": len(stats.fallbacks)}
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(counts))


def start(folder: str) -> None:
    """Runs both ranks, in forks of a process without threads."""
    torch.multiprocessing.start_processes(run, (folder,), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, Counts]:
    folder = tmp_path_factory.mktemp("ranks")
    program = Program(f"from tests.dynamo.test_ranks import start\nstart({str(folder)!r})\n")
    ended = warm.run(program, ROOT)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Counts] = json.loads((folder / "counts.json").read_text())
    return result


@pytest.mark.parametrize(("name", "blocks"), [("ddp", 2), ("fsdp", 2), ("experts", 1)])
def test_blocks_are_recognised(name: str, blocks: int, counts: dict[str, Counts]) -> None:
    assert counts[name] == {"blocks": blocks, "fallbacks": 0}
