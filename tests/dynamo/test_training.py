"""Gradients through replaced blocks equal eager's, and so does a model trained with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.dynamo import FallbackWarning
from tests.dynamo.modules import Gathered, Listed, Masked, Model
from tests.models.families import FAMILIES


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="moec", dynamic=True, options={"rest": "eager", "strict": True, **options}
    )


def gradients(run: Any, model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    run(x).square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("form", [Masked, Gathered, Listed, Model])
def test_gradients(form: type[nn.Module]) -> None:
    model, eager = form(), form()
    eager.load_state_dict(model.state_dict())
    run = compiled(model)
    for tokens in (7, 2, 19):  # 2: experts that nobody chose get zeros
        x = torch.randn(3, tokens, 16) if form in (Masked, Model) else torch.randn(tokens, 16)
        for actual, theirs in zip(
            gradients(run, model, x), gradients(eager, eager, x), strict=True
        ):
            # A gradient that eager leaves None is one that nothing reached.
            theirs = torch.zeros_like(actual) if theirs is None else theirs
            torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-6)
    assert moec.stats().compilations == 1
    assert moec.stats().blocks > 0


@pytest.mark.parametrize("form", [Masked, Gathered])
def test_float64_is_float64(form: type[nn.Module]) -> None:
    model = form().double()
    x = torch.randn(*((3, 7, 16) if form is Masked else (21, 16)), dtype=torch.float64)
    right = gradients(model, model, x)
    for gradient, expected in zip(gradients(compiled(model), model, x), right, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
    assert moec.stats().blocks > 0


def test_frozen_weights_get_no_gradient() -> None:
    model = Masked()
    model.gate.requires_grad_(False)
    x = torch.randn(2, 5, 16, requires_grad=True)
    compiled(model)(x).sum().backward()
    assert model.gate.grad is None
    assert model.up.grad is not None


def test_frozen_experts_are_packed_once() -> None:
    """Only the router and the layers before the block are trained."""
    model = Masked()
    eager = copy.deepcopy(model)
    run = compiled(model)
    x = torch.randn(2, 5, 16)
    for which in (model, eager):
        for stack in (which.gate, which.up, which.down):
            stack.requires_grad_(False)
    for _ in range(2):
        actual, theirs = gradients(run, model, x), gradients(eager, eager, x)
        for one, other in zip(actual, theirs, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert moec.stats().packs == 1


def test_what_an_optimiser_changes_is_never_packed() -> None:
    model = Masked()
    eager = copy.deepcopy(model)
    run = compiled(model)
    x = torch.randn(2, 5, 16)
    for which, forward in ((model, run), (eager, eager)):
        optimiser = torch.optim.SGD(which.parameters(), lr=0.1)
        for _ in range(4):
            forward(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert moec.stats().packs == 0
    for actual, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-6)


class Balanced(Masked):
    """A bias that only the choice of experts reads balances their load, as in DeepSeek-V3."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(4))

    def balance(self, chosen: Tensor) -> None:
        load = F.one_hot(chosen, 4).sum((0, 1)).float()
        self.bias += 0.3 * torch.sign(load.mean() - load)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 16)
        scores = self.router(rows).sigmoid()
        chosen = (scores + self.bias).topk(2, -1).indices
        weights = scores.gather(1, chosen)
        y = torch.zeros_like(rows)
        for expert in range(len(self.gate)):
            share = ((chosen == expert) * weights).sum(-1, keepdim=True)
            y = y + (rows @ self.gate[expert].T).relu() @ self.down[expert].T * share
        with torch.no_grad():
            self.balance(chosen)
        return y


class Outside(Balanced):
    """The bias is changed after the forward pass."""

    def balance(self, chosen: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("form", "frozen", "rest"),
    [(Balanced, False, "inductor"), (Outside, False, "eager"), (Outside, True, "eager")],
)
def test_a_bias_of_the_choice_may_change_before_the_backward_pass(
    form: type[Balanced], frozen: bool, rest: str
) -> None:
    model = form()
    for stack in (model.gate, model.up, model.down):
        stack.requires_grad_(not frozen)
    eager = copy.deepcopy(model)
    run = compiled(model, rest=rest)
    for _ in range(2):
        x, grads = torch.randn(2, 5, 16), []
        for which, forward in ((model, run), (eager, eager)):
            which.zero_grad()
            y = forward(x)
            with torch.no_grad():
                which.bias += torch.tensor([0.5, -0.5, 1, 0])
            y.square().sum().backward()
            grads.append(which.router.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.bias, eager.bias)
    assert moec.stats().blocks == 1


class Stopped(Masked):
    """The router learns nothing from the experts."""

    def stop(self, weights: Tensor) -> Tensor:
        return weights.detach()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 16)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        weights = self.stop(weights)
        y = torch.zeros_like(rows)
        for expert in range(len(self.gate)):
            share = ((chosen == expert) * weights).sum(-1, keepdim=True)
            y = y + (rows @ self.gate[expert].T).relu() @ self.down[expert].T * share
        return y


class Data(Stopped):
    def stop(self, weights: Tensor) -> Tensor:
        return weights.data


class NoGrad(Stopped):
    def stop(self, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return weights * 1


@pytest.mark.parametrize("form", [Stopped, Data, NoGrad])
def test_a_stopped_gradient_leaves_the_block_to_torch(form: type[nn.Module]) -> None:
    model, x = form(), torch.randn(2, 5, 16)
    with pytest.warns(FallbackWarning, match=r"gradients stop at .* inside the block") as record:
        compiled(model, strict=False)(x).square().mean().backward()
    assert len(record) == 1
    assert model.router.weight.grad is None
    torch._dynamo.reset()
    with torch.no_grad():  # without gradients it is a block like any other
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)


class Doubled(torch.autograd.Function):
    """The identity, with twice the correct gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_backward_of_ones_own_is_kept() -> None:
    class Own(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Doubled.apply(x))

    model = Own()
    x = torch.randn(2, 5, 16)
    theirs = gradients(model, model, x)[0]
    with pytest.warns(FallbackWarning, match="has its own backward"):
        actual = gradients(compiled(model, strict=False), model, x)[0]
    torch.testing.assert_close(actual, theirs)


# Biases and clamps; a shared expert, a sigmoid router in groups. The bodies of the others
# are in tests/dynamo/test_gradients.py.
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_gradients_of_families(name: str) -> None:
    family = FAMILIES[name].one_layer()
    model, eager = moec.prepare(family.build()), family.build()
    run = compiled(model)
    for length in (7, 4):
        inputs = family.inputs(2, length)
        for which, forward in ((model, run), (eager, eager)):
            which.zero_grad()
            forward(**inputs, labels=inputs["input_ids"]).loss.backward()
        pairs = zip(model.named_parameters(), eager.parameters(), strict=True)
        for (where, actual), theirs in pairs:
            if theirs.grad is not None:
                # float32 sums of some dozen terms in another order, through one layer and a head
                torch.testing.assert_close(
                    actual.grad,
                    theirs.grad,
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m, w=where: f"{w}: {m}",
                )
    assert moec.stats().blocks > 0
    assert moec.stats().fallbacks == ()


def test_experts_of_a_prepared_model_learn_without_the_backend() -> None:
    family = FAMILIES["qwen2_moe"]
    prepared, eager = moec.prepare(family.build()), family.build()
    inputs = family.inputs(2, 7)
    for model in (prepared, eager):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, actual), theirs in zip(prepared.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_fine_tuning_follows_eagers_loss(tiny_moe: Path, short_moe: Path) -> None:
    """On a text that is never edited: on noise, and on texts where a token is nearly between two
    experts, two eager implementations of the experts differ as much."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (tiny_moe.parents[2] / "LICENSE").read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_moe)(text[:2000])["input_ids"])
    steps, losses = 50, []
    for backend in (False, True):
        model = AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).train()
        run = compiled(moec.prepare(model)) if backend else model
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for step in range(steps):
            starts = torch.randint(len(ids) - 40, (4,), generator=generator)
            tokens = torch.stack([ids[start : start + 24 + step % 5] for start in starts])
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(float(loss.detach()))
    eager, actual = losses
    assert eager[-1] < eager[0]
    assert max(abs(a - b) for a, b in zip(eager, actual, strict=True)) < 1e-3
    stats = moec.stats()
    assert (stats.compilations, stats.blocks, stats.fallbacks) == (1, 2, ())
