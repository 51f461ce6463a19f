"""Exact passes on the trained model, over random routings: unchanged results.

Where a pass would find nothing in tiny_moe, its MoE layer is replaced by one of the same trained
experts with adapters, a task, an architecture, or a router of token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moec
from moec.ir.graph import Program, TensorType, Value
from moec.ir.interpret.evaluate import evaluate
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.approximate.keep_used import KeepUsed
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.calibration.session import Approximate
from moec.passes.specialise.hoist_routers import split
from tests.passes.changed import change

E, D, K, TASKS = 8, 128, 2, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order, logits of about 10
SEEDS = range(3)


def text(seed: int, count: int = 24) -> Tensor:
    return torch.randint(1024, (2, count), generator=torch.Generator().manual_seed(seed))


def outputs(program: Program, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return evaluate(program.graph, list(inputs), program.weights)[0]


# ---- the model as it is -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_moe: Any) -> Program:
    """Blocks recognised, and a bias of zero for every router."""
    model = moec.compile(tiny_moe, stop_after="split-packed", dtype="float32", kv_cache=False)
    program = model.pass_results[-1].program
    graph, weights = program.graph, dict(program.weights)
    ops, params = list(graph.ops), list(graph.params)
    for i, op in enumerate(ops):
        if op.name == "aten.linear.default" and op.outputs[0].shape[-1] == E:
            bias = Value(f"{op.inputs[1].name}.bias", TensorType("f32", (E,)))
            ops[i] = replace(op, inputs=(*op.inputs, bias))
            params.append(bias)
            weights[bias.name] = torch.zeros(E)
    assert len(params) == len(graph.params) + 4
    return Program(replace(graph, ops=tuple(ops), params=tuple(params)), weights)


def routed(program: Program, seed: int, never: int = 0) -> Program:
    """With other routers: random, and of strengths that differ; the last `never` never win."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(program.weights)
    for name in [name for name in weights if name.endswith(".bias")]:
        matrix = weights[name.removesuffix(".bias")]
        strength = 10.0 ** torch.randint(-2, 2, (), generator=generator) / D**0.5
        weights[name.removesuffix(".bias")] = strength * torch.randn(
            matrix.shape, generator=generator
        )
        weights[name] = torch.tensor([0.0] * (E - never) + [-1e9] * never)
    return Program(program.graph, weights)


@pytest.mark.parametrize(
    "pass_",
    [
        KeepUsed(threshold=0),
        *(PruneExperts(keep=0.75, by=by) for by in ("usage", "reap", "error")),
        PruneExperts(keep=0.75, by="error", scope="global"),
    ],
    ids=["keep-used", "usage", "reap", "error", "global"],
)
def test_experts_that_nobody_chooses_go(trained: Program, pass_: Approximate) -> None:
    original = routed(trained, 7, never=2)
    calib = {"input_ids": text(0, 64)}
    step = change(original, pass_, calib=calib, limit="changed<=0,error<=1e-5")[-1]
    assert step.damage is not None
    assert [line.says for line in step.damage.layers] == ["keeps 0, 1, 2, 3, 4, 5 of 8"] * 4
    for seed in SEEDS:
        torch.testing.assert_close(
            outputs(step.program, text(seed)), outputs(original, text(seed)), **CLOSE
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_experts_fold_into_one(trained: Program, seed: int) -> None:
    """What Experts Weights Averaging ends with."""
    original = routed(trained, seed)
    for name in [name for name in original.weights if ".experts." in name]:
        stack = original.weights[name]
        original.weights[name] = stack[seed].expand_as(stack).clone()
    step = change(original, AverageExperts(), calib={"input_ids": text(0, 64)})[-1]
    assert not any(op.name.startswith("moe.") for op in step.program.graph.ops)
    torch.testing.assert_close(
        outputs(step.program, text(seed)), outputs(original, text(seed)), **CLOSE
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_neutral_columns_win_nowhere(trained: Program, seed: int) -> None:
    """In eager; approximate/test_insert_zero_experts.py has the bits of compiled code."""
    original = routed(trained, seed)
    calib = {"input_ids": text(0, 64)}
    step = change(original, InsertZeroExperts(), calib=calib, limit="changed<=0,error<=1e-5")[-1]
    assert step.damage is not None
    assert [line.undone for line in step.damage.layers] == [False] * 4
    torch.testing.assert_close(
        outputs(step.program, text(seed)), outputs(original, text(seed)), **CLOSE
    )


# ---- its experts behind other routers, and made of other weights --------------------------


class Experts(nn.Module):
    """The experts of one layer of tiny_moe; what routes to them is up to the kind."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        gate, up = trained.experts.gate_up_proj.detach().chunk(2, 1)
        self.gate, self.up = nn.Parameter(gate.clone()), nn.Parameter(up.clone())
        self.down = nn.Parameter(trained.experts.down_proj.detach().clone())

    def chosen(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, D], logits [T, E] -> [T, D]"""
        weights, ids = logits.softmax(-1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, up = (torch.einsum("td,tkhd->tkh", x, w[ids]) for w in (self.gate, self.up))
        rows = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, self.down[ids])
        return (rows * weights[..., None]).sum(1)


class ByIds(Experts):
    def __init__(self, trained: Any) -> None:
        super().__init__(trained)
        self.router = nn.Embedding(1024, E)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.chosen(x, self.router(ids).flatten(0, 1))


class ByTask(Experts):
    """A gate for each task, and experts that a task may not choose; or, by the task alone."""

    def __init__(self, trained: Any, alone: bool = False) -> None:
        super().__init__(trained)
        self.router, self.alone = nn.Parameter(torch.randn(TASKS, E, D)), alone
        self.by_task = nn.Embedding(TASKS, E)
        barred = torch.zeros(TASKS, E)
        barred[1, [0, 3, 6]] = -math.inf
        self.register_buffer("barred", barred)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        if self.alone:
            return self.chosen(x, self.by_task(task).expand(x.shape[0], E))
        return self.chosen(x, F.linear(x, self.router[task]) + F.embedding(task, self.barred))


class Adapted(nn.Module):
    """x W^T + 2 (x A^T) B^T"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(weight.clone())
        self.a = nn.Linear(weight.shape[1], 4, bias=False)
        self.b = nn.Linear(4, weight.shape[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = F.linear(x, self.base) + 2.0 * self.b(self.a(x))
        return result


class WithLora(nn.Module):
    """Each expert's three layers with adapters of their own."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        private = Experts(trained)
        self.router = nn.Linear(D, E, bias=False)
        self.gate, self.up, self.down = (
            nn.ModuleList(Adapted(w) for w in stack.detach())
            for stack in (private.gate, private.up, private.down)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).topk(K, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            y = y + down(F.silu(gate(x)) * up(x)) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y


class Supernet(nn.Module):
    """Experts whose weights are mixed of two for an architecture, of 256 neurons 192 kept."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        private = Experts(trained)
        self.router, self.mixer = nn.Linear(D, E, bias=False), nn.Linear(2, 2)
        stacks = [stack.detach() for stack in (private.gate, private.up, private.down)]
        self.gate, self.up, self.down = (
            nn.Parameter(torch.stack([stack, stack.roll(1, 0)])) for stack in stacks
        )

    def forward(self, x: Tensor, arch: Tensor) -> Tensor:
        share = self.mixer(arch).softmax(-1)
        cut = (self.gate[:, :, :192], self.up[:, :, :192], self.down[..., :192])
        gate, up, down = (torch.einsum("i,ieab->eab", share, stack) for stack in cut)
        weights, ids = self.router(x).topk(K, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for e in range(E):
            hidden = F.silu(F.linear(x, gate[e])) * F.linear(x, up[e])
            y = y + F.linear(hidden, down[e]) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y


class Tiny(nn.Module):
    """tiny_moe's first layers, ids i64[B, S] -> logits [B, S, 1024]; `extra` is for the experts."""

    def __init__(self, folder: Any, *kinds: Callable[[Any], nn.Module], ids: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.head, self.ids = trained.model, trained.lm_head, ids
        self.layers = self.model.layers[: len(kinds)]
        self.experts = nn.ModuleList(
            kind(layer.mlp) for kind, layer in zip(kinds, self.layers, strict=True)
        )
        for layer in self.model.layers:
            del layer.mlp
        self.requires_grad_(False).eval()

    def forward(self, ids: Tensor, *extra: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        positions = self.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        for layer, experts in zip(self.layers, self.experts, strict=True):
            x = x + layer.self_attn(layer.input_layernorm(x), positions, None)[0]
            rows = layer.post_attention_layernorm(x).flatten(0, 1)
            x = x + experts(rows, *((ids,) if self.ids else extra)).unflatten(0, ids.shape)
        result: Tensor = self.head(self.model.norm(x))
        return result


def changed_routers(model: nn.Module, program: Program, seed: int) -> Program:
    """New routers for the module, in place, and for the program."""
    generator, weights = torch.Generator().manual_seed(seed), dict(program.weights)
    for name, weight in model.named_parameters():
        if ".router" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator))
            assert name in weights
            weights[name] = weight.clone()
    return Program(program.graph, weights)


def compiled(model: nn.Module, *inputs: Any, passes: str) -> Any:
    return moec.compile(model, (text(0), *inputs), passes=passes, build=False, verify=False)


def test_adapters_fold(tiny_moe: Any) -> None:
    model = Tiny(tiny_moe, WithLora)
    compiled_model = compiled(model, passes="+fold-lora")
    assert [block.experts for block in compiled_model.blocks] == [E]
    for seed in SEEDS:
        program = changed_routers(model, compiled_model.pass_results[-1].program, seed)
        torch.testing.assert_close(outputs(program, text(seed)), model(text(seed)), **CLOSE)


def test_a_supernet_folds(tiny_moe: Any) -> None:
    arch = torch.tensor([1.0, 0.5])
    model = Tiny(tiny_moe, Supernet)
    compiled_model = compiled(model, arch, passes="+fold-supernet(extra_0=1:0.5)")
    assert [block.experts for block in compiled_model.blocks] == [E]
    for seed in SEEDS:
        program = changed_routers(model, compiled_model.pass_results[-1].program, seed)
        torch.testing.assert_close(outputs(program, text(seed)), model(text(seed), arch), **CLOSE)


def test_one_task_is_left(tiny_moe: Any) -> None:
    """Five experts of the first layer, and of the second those two that the task takes, dense."""
    model = Tiny(tiny_moe, ByTask, lambda trained: ByTask(trained, alone=True))
    task = torch.tensor(1)
    compiled_model = compiled(model, task, passes="+specialise(extra_0=1)")
    assert [block.experts for block in compiled_model.blocks] == [E - 3]
    for seed in SEEDS:
        torch.testing.assert_close(
            outputs(compiled_model.pass_results[-1].program, text(seed)),
            model(text(seed), task),
            **CLOSE,
        )


def test_routers_of_ids_run_alone(tiny_moe: Any) -> None:
    model = Tiny(tiny_moe, ByIds, ids=True)
    compiled_model = compiled(model, passes="+hoist-routers")
    for seed in SEEDS:
        program = changed_routers(model, compiled_model.pass_results[-1].program, seed)
        parts = split(program)
        assert parts is not None
        assert len(parts.choices) == 1
        right = outputs(program, text(seed))
        torch.testing.assert_close(right, model(text(seed)), **CLOSE)
        choices = evaluate(parts.route.graph, [text(seed)], parts.route.weights)
        assert torch.equal(outputs(parts.routed, text(seed), *choices), right)
