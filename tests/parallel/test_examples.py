"""Two published systems compiled and run by the commands: a pyramid of residual layers, and experts
without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.plan.plan import LayerPlan, Plan, write_plan
from moec.runtime.text.request import Request
from tests.command_line import invoke
from tests.parallel import entries
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
    devices = layers[0].ranks * layers[0].slices
    return structs.replace(plan(2), devices=devices, layers=layers)


def cli(*arguments: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "not as planned" not in result.output


def compiled(factory: str, p: Plan, folder: Path) -> Path:
    """The ranks of a model of this file, compared with it."""
    write_plan(p, folder / "plan.json")
    plan_file, output = str(folder / "plan.json"), folder / "out.ranks"
    cli("compile", f"{__file__}:{factory}", "--plan", plan_file, "-o", str(output))
    return output


def logits(folder: Path, ids: Tensor, ranks: int) -> Tensor:
    """Those of several ranks, the first of which may have more texts."""
    source, output = (str(folder.with_suffix(end)) for end in (".in.npz", ".npz"))
    np.savez(source, ids=ids.numpy())
    cli("run", str(folder), "--nproc", str(ranks), "--timeout", "300", "-i", source, "-o", output)
    with np.load(output) as file:
        (result,) = (file[name] for name in file)
    return torch.from_numpy(result)


def pyramid() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    config = replace(deepspeed.SMALL, layers=4, experts=(2, 4), factor=0.5)
    return deepspeed.GPT(config).eval(), (torch.randint(config.vocabulary, (3, 9)),)


def zero_experts() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = plus_plus.small()
    return model, inputs


def test_a_pyramid_of_residual_layers(tmp_path: Path) -> None:
    """Two experts in slices, then four on two ranks. There is room for half of the choices: which
    of them are kept depends on the tokens of both ranks."""
    model, (ids,) = pyramid()
    p = of_layers(layer(2, 1, 2, [[0, 1]]), layer(4, 2, 1, [[0, 1], [2, 3]]))
    result = logits(compiled("pyramid", p, tmp_path), ids, 2)
    with torch.no_grad():
        expected = model(ids)
        apart = torch.cat([model(ids[:2]), model(ids[2:])])
    torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (apart - expected).abs().max() > 100 * TOLERANCE
    assert torch.equal(result.argmax(-1), expected.argmax(-1))


def test_experts_of_no_network(tmp_path: Path) -> None:
    """Zero, copy and constant experts are on every rank; three networks are shared out among four
    ranks, two nodes of two, with rows along the rails. One rank has no text."""
    model, (ids,) = zero_experts()
    slots = [[0], [1], [2], [0]]
    layers = [structs.replace(layer(3, 4, 1, slots), form="rail") for _ in range(2)]
    folder = compiled("zero_experts", of_layers(*layers), tmp_path)
    ids = torch.cat([ids, ids[:1].flip(1), ids[1:].flip(1)])
    with torch.no_grad():
        expected = model(ids)
        texts = [torch.tensor([prompt]) for prompt in PROMPTS]
        for _ in range(TOKENS):
            texts = [torch.cat([t, model(t)[:, -1:].argmax(-1)], 1) for t in texts]
    torch.testing.assert_close(logits(folder, ids, 4), expected, rtol=TOLERANCE, atol=TOLERANCE)
    job = Job(folder, None, None, 300.0, 1)
    tokens = launch(job, 4, entries.tokens, PROMPTS, Request(TOKENS))
    assert tokens == [
        text[0, len(prompt) :].tolist() for text, prompt in zip(texts, PROMPTS, strict=True)
    ]
