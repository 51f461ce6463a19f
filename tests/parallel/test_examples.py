"""Two published systems on two ranks: a pyramid of residual layers, and experts of no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor, nn

import moec
from moec.commands.ranks import check
from moec.ir.graph import Module, Program
from moec.parallel.launch import launch
from moec.parallel.process import Continuation, Job
from moec.parallel.save import save_ranks
from moec.parallel.worker import continue_rank, run_rank
from moec.passes.decode import incremental
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.plan import LayerPlan, Plan
from moec.runtime.generate import Request
from moec.runtime.package import DECODE
from tests.passes.parallel.test_plan_parallelism import plan
from tests.systems.records import load

deepspeed, plus_plus = load("02_deepspeed_moe"), load("06_moe_plus_plus")
PROMPTS = ((5, 9, 12, 7, 33), (100, 3), (64,))
TOKENS = 6
# float32, sums of at most 64 terms in another order, through at most four layers.
TOLERANCE = 1e-5


def layer(experts: int, ranks: int, slices: int, slots: Sequence[Sequence[int]]) -> LayerPlan:
    form = "coordinated" if slices > 1 else "flat"
    return structs.replace(
        plan(2).layers[0],
        experts=experts,
        ranks=ranks,
        slices=slices,
        form=form,
        slots=tuple(map(tuple, slots)),
    )


def of_layers(*layers: LayerPlan) -> Plan:
    return structs.replace(plan(2), layers=layers)


def program_of(model: nn.Module, ids: Tensor) -> Program:
    compiled = moec.compile(model, (ids,), verify=False, stop_after="split-packed")
    return compiled.pass_results[-1].program


def logits(folder: Path, ids: Tensor) -> Tensor:
    """Those of two ranks, the first of which has more texts."""
    np.savez(folder.with_suffix(".in.npz"), ids=ids.numpy())
    source, output = folder.with_suffix(".in.npz"), folder.with_suffix(".npz")
    launch(Job(folder, source, output, 300.0, 1), 2, run_rank)
    with np.load(output) as file:
        (result,) = (file[name] for name in file)
    return torch.from_numpy(result)


@pytest.mark.long
def test_a_pyramid_of_residual_layers(tmp_path: Path) -> None:
    """Two experts in slices, then four on two ranks. There is room for half of the choices: which
    of them are kept depends on the tokens of both ranks."""
    torch.manual_seed(0)
    config = replace(deepspeed.SMALL, layers=4, experts=(2, 4), factor=0.5)
    model, ids = deepspeed.GPT(config).eval(), torch.randint(config.vocabulary, (3, 9))
    p = of_layers(layer(2, 1, 2, [[0, 1]]), layer(4, 2, 1, [[0, 1], [2, 3]]))
    program = program_of(model, ids)
    module = rank_programs(program, p)
    check(module, program, p, (ids,), verify=TOLERANCE)
    save_ranks(module, p, tmp_path / "pyramid.ranks")
    with torch.no_grad():
        expected = model(ids)
        apart = torch.cat([model(ids[:2]), model(ids[2:])])
    result = logits(tmp_path / "pyramid.ranks", ids)
    torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (apart - expected).abs().max() > 100 * TOLERANCE
    assert torch.equal(result.argmax(-1), expected.argmax(-1))


@pytest.mark.long
def test_experts_of_no_network(tmp_path: Path) -> None:
    """Zero, copy and constant experts are on every rank; the networks are shared out, one twice."""
    torch.manual_seed(0)
    model, (ids,) = plus_plus.small()
    p = of_layers(layer(3, 2, 1, [[0, 1], [2]]), layer(3, 2, 1, [[0, 1], [1, 2]]))
    program = program_of(model, ids)
    main = rank_programs(program, p)
    decode = rank_programs(incremental(program), p, function=DECODE)
    folder = tmp_path / "plus_plus.ranks"
    save_ranks(Module({**main.programs, **decode.programs}), p, folder)
    ids = torch.cat([ids, ids[:1].flip(1)])
    with torch.no_grad():
        expected = model(ids)
        texts = [torch.tensor([prompt]) for prompt in PROMPTS]
        for _ in range(TOKENS):
            texts = [torch.cat([t, model(t)[:, -1:].argmax(-1)], 1) for t in texts]
    torch.testing.assert_close(logits(folder, ids), expected, rtol=TOLERANCE, atol=TOLERANCE)
    job = Job(folder, None, None, 300.0, 1, texts=Continuation(PROMPTS, Request(TOKENS)))
    tokens = launch(job, 2, continue_rank)
    assert tokens == [
        text[0, len(prompt) :].tolist() for text, prompt in zip(texts, PROMPTS, strict=True)
    ]
