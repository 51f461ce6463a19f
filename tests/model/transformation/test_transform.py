"""moec.transform: the result of passes as a module that trains and compiles."""

from __future__ import annotations

import copy
import io
from functools import cache

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import moec
from moec.errors import InputError, UsageError
from moec.ir.formats.notation import Format
from moec.ir.graph import Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.interpret.outputs import flatten
from moec.ir.text import print_graph
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.pipeline import choose, exact
from moec.verify.bisect import bisect
from tests.passes.changed import change, program, tokens

PASSES = {
    "prune": PruneExperts(keep=0.75),
    "merge": MergeExperts(keep=0.5),
    "average": AverageExperts(),
}
MEMBERS = "linear.members"  # of a model that is one layer
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order, logits of about 10


class Small(nn.Module):
    """A language model of one MoE layer, a loop over experts."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, 12) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(12, width) for _ in range(experts))
        self.register_buffer("scale", torch.full((width,), 2.0))

    def forward(self, ids: torch.Tensor, twice: bool = False) -> torch.Tensor:
        x = self.embed(ids).flatten(0, 1) * self.scale
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            y = y + weight * down(up(x).relu())
        return (y @ self.embed.weight.T).unflatten(0, ids.shape)


def small() -> Small:
    torch.manual_seed(3)
    return Small()


def calib(limit: int = 20) -> dict[str, torch.Tensor]:
    return {"ids": tokens(256, limit=limit)}


def transformed(pass_, **options):
    return moec.transform(small(), [pass_], (tokens(32),), calib=calib(), **options)


@cache
def text(limit: int = 1024) -> torch.Tensor:
    return torch.randint(limit, (2, 40), generator=torch.Generator().manual_seed(0))


def of_checkpoint(path, pass_, **options):
    return moec.transform(path, [pass_], calib={"input_ids": text()}, dtype="float32", **options)


@pytest.mark.parametrize("name", PASSES)
def test_the_module_computes_what_the_compiled_pass_does(name):
    module = transformed(PASSES[name])
    compiled = moec.compile(
        small(), (tokens(32),), passes=[PASSES[name]], calib=calib(), kv_cache=False
    )
    assert isinstance(module, GraphModule)
    for count in (16, 48, 80):
        ids = tokens(count, seed=count)
        torch.testing.assert_close(module(ids), torch.as_tensor(compiled(ids)), **CLOSE)
    assert [d.after for d in module.transformation.damage] == [
        d.after for d in compiled.report().damage
    ]


@pytest.mark.parametrize("name", PASSES)
def test_it_trains_and_compiles_again(name):
    module = transformed(PASSES[name])
    ids = tokens(64, seed=5)
    losses = trained(module, ids, steps=12)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in module.parameters())
    again = moec.compile(module, kv_cache=False)  # verified against the module
    torch.testing.assert_close(torch.as_tensor(again(ids)), module(ids).detach(), **CLOSE)
    assert [block.experts for block in again.blocks] == {"prune": [3], "merge": [2], "average": []}[
        name
    ]


def trained(module, ids, steps, **named):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        model = module(ids, **named)
        logits = model if isinstance(model, torch.Tensor) else model.logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_gradients_are_those_of_the_source():
    """Pruned by nothing that any token chose, the module is the source: so are its gradients."""
    source = small()
    with torch.no_grad():
        source.gate.weight[3] = 0
        source.embed.weight[:, 0] = 5.0
        source.gate.weight[:3, 0] += 3.0  # no token chooses expert 3
    module = moec.transform(source, [PruneExperts(keep=0.75)], (tokens(32),), calib=calib())
    ids = tokens(64, seed=2)
    for model in (source, module):
        model(ids).square().mean().backward()
    held = dict(module.named_parameters())
    torch.testing.assert_close(held["embed.weight"].grad, source.embed.weight.grad, **CLOSE)
    torch.testing.assert_close(held["gate.weight_2"].grad, source.gate.weight.grad[:3], **CLOSE)


def test_a_checkpoint_keeps_its_class(short_moe, tmp_path):
    module = of_checkpoint(short_moe, PASSES["prune"])
    assert type(module) is transformers.Qwen3MoeForCausalLM
    assert module.config.num_experts == 6
    assert module.model.layers[1].mlp.experts.gate_up_proj.shape[0] == 6
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.transformation.form == "class"
    assert module.transformation.damage[0].after.kl > 0
    losses = trained(module, text()[:1, :32], steps=4, use_cache=False)
    assert losses[-1] < losses[0]
    module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = text()[:2, :9]
    assert torch.equal(again(ids).logits, module(ids).logits)


def test_a_checkpoint_of_no_class_trains_and_writes(short_moe):
    module = of_checkpoint(short_moe, PASSES["merge"], verify=False)
    assert isinstance(module, GraphModule)
    ids = text()[:1, :32]
    assert isinstance(module(input_ids=ids, use_cache=False).logits, torch.Tensor)
    losses = trained(module, ids, steps=4)
    assert losses[-1] < losses[0]
    compiled = moec.compile(module, kv_cache=False, verify=False)
    torch.testing.assert_close(compiled(ids).logits, module(ids).logits.detach(), **CLOSE)
    why = "model.layers.0.mlp routes to experts that are several of the model's"
    assert module.transformation.why == why
    with pytest.raises(UsageError, match=f"{why}: save its state_dict"):
        module.save_pretrained("anywhere")


def test_why_a_module_is_of_no_class(short_moe):
    with pytest.raises(
        UsageError, match=r"can no longer be an instance of its class: .* has lost its router"
    ):
        of_checkpoint(short_moe, PASSES["average"], form="class", verify=False)
    with pytest.raises(UsageError, match="it is not a model of transformers"):
        transformed(PASSES["prune"], form="class")


def test_layers_of_different_numbers_are_of_no_class(tiny_moe):
    """A budget that stops after some layers leaves the others whole."""
    module = of_checkpoint(tiny_moe, PruneExperts(keep=0.5), budget="kl<=0.5", verify=False)
    assert "its layers have 4, 8 experts left of 8" in module.transformation.why
    assert any("kl" in d.reason for d in module.transformation.declined)


def test_weights_keep_their_names_and_their_kind():
    source = small()
    source.embed.weight.requires_grad_(False)
    module = moec.transform(source, [PASSES["merge"]], (tokens(32),), calib=calib())
    kinds = {name: p.requires_grad for name, p in module.named_parameters()}
    assert kinds["embed.weight"] is False
    assert kinds["gate.weight"] is True
    buffers = {name for name, _ in module.named_buffers()}
    assert {"scale", MEMBERS} <= buffers  # who belongs to whom is not trained
    before = module.get_buffer(MEMBERS).clone()
    trained(module, tokens(32), steps=2)
    assert torch.equal(module.get_buffer(MEMBERS), before)
    with torch.no_grad():
        module.get_parameter("gate.weight").zero_()
    assert source.gate.weight.abs().sum() > 0  # the source is left alone


def test_names_on_the_way_to_others():
    original = change(program(1), MergeExperts(keep=0.5))[-1].program
    assert "layers.0.router" in original.weights  # and layers.0.router.members
    module = GraphModule(original, {}, ((), {}), flatten(torch.zeros(0))[1])
    ids = tokens(32)
    assert torch.equal(module(ids), evaluate(original.graph, [ids], original.weights)[0])
    assert {"layers.0.router", "layers.0.router_members"} <= set(module.state_dict())


def test_copies_and_pickles():
    module = transformed(PASSES["merge"])
    ids = tokens(32, seed=9)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert torch.equal(other(ids), module(ids))
        assert print_graph(other.graph) == print_graph(module.graph)
    fresh = transformed(PASSES["merge"], verify=False)
    trained(fresh, ids, steps=1)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(ids), module(ids))


def test_transformed_again():
    """A module that is a graph goes in as any other: its blocks are known already."""
    once = transformed(PASSES["prune"])
    twice = moec.transform(once, "+average-experts", calib=calib())
    assert isinstance(twice, GraphModule)
    assert not any(op.name == "moe.experts" for op in twice.graph.ops)
    assert {n: p.requires_grad for n, p in twice.named_parameters()}["embed.weight"]
    assert "scale" in dict(twice.named_buffers())
    text = "+prune-experts(keep=0.5),+average-experts"
    both = moec.transform(small(), text, (tokens(32),), calib=calib())
    assert [d.name for d in both.transformation.damage] == [
        "prune-experts(keep=0.5,by=usage,seed=0,scope=layer)",
        "average-experts(by=uniform)",
    ]


def test_bisect_starts_where_the_module_is():
    module = transformed(PASSES["prune"])
    culprit = bisect(module.program, exact(choose(), ""), [(tokens(32),)])
    assert culprit.culprit is None
    assert moec.compile(module, stop_after="capture").pass_results[0].stage is Stage.MOE


def test_calls_are_those_of_the_source():
    module = transformed(PASSES["prune"])
    ids = tokens(32)
    assert torch.equal(module(ids=ids, twice=False), module(ids))
    with pytest.raises(InputError, match="input ids is missing: the model takes ids"):
        module()
    with pytest.raises(InputError, match="no input labels: the model was captured with ids"):
        module(ids, labels=ids)
    with pytest.raises(
        UsageError, match=r"bfloat16, and the model was captured in torch.float32: convert it"
    ):
        copy.deepcopy(module).bfloat16()(ids)
    with pytest.raises(moec.MoecError, match="sizes of a transformed module are fixed"):
        moec.compile(module, dynamic_shapes=({},))


@pytest.mark.parametrize(
    ("passes", "options", "says"),
    [
        ("", {}, "passes has no pass that changes the model"),
        ("+fuse-gate", {}, "passes has no pass that changes the model"),
        ([QuantiseExperts(Format("int8"))], {}, "codes, which have no gradient: train the module"),
        ("+quantise-experts", {}, "quantise when it is compiled"),
        ("+prune-experts", {"form": "onnx"}, "form is 'onnx', expected one of auto, class, graph"),
        ("+prune-experts", {"strict": True}, "strict fails when the budget is exceeded"),
        ("+prune-experts", {"calib": 3}, "calib is a int"),
        ("+prune-experts", {"allow_fixed": 3}, "allow_fixed is 3: give True, or the names"),
        (
            "+prune-experts",
            {"dynamic_shapes": 3},
            ("dynamic_shapes is 3: give the dynamic_shapes of torch.export"),
        ),
    ],
)
def test_refusals(passes, options, says):
    with pytest.raises(UsageError, match=says):
        moec.transform(small(), passes, (tokens(32),), **{"calib": calib()} | options)


def test_a_cache_is_refused():
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return super().forward(ids)

    with pytest.raises(UsageError, match=r"keeps state between calls \(seen\)"):
        moec.transform(Counting(), [PASSES["prune"]], (tokens(32),), calib=calib())
