"""EWA of examples/training: experts while a model trains, and the same model afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

from examples.training.ewa import (
    EWA,
    ConstantRate,
    ExpertLinear,
    LinearRate,
    feedforwards,
    mean,
    share,
)
from moec.errors import UsageError


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + (self.query(x) @ x.mT).softmax(-1) @ self.value(x)
        return x + self.mlp(self.norm(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
        self.down = nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * nn.functional.silu(self.gate(x)))  # up is called first


def blocks(count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(count)))


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


MODELS = {
    "blocks": (blocks, (2, 5, 8), ["0.mlp.0, 0.mlp.2", "1.mlp.0, 1.mlp.2"]),
    "gated": (lambda: nn.Sequential(Gated()), (3, 8), ["0.gate, 0.up, 0.down"]),
    "plain": (lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)), (7, 4), ["0, 2"]),
    "torch's encoder": (encoder, (2, 5, 8), ["linear1, linear2"]),
    "vit": (
        vit,
        (2, 1, 8, 8),
        [f"vit.layers.{i}.mlp.fc1, vit.layers.{i}.mlp.fc2" for i in range(2)],
    ),
}


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    module = model(x)
    return module if isinstance(module, torch.Tensor) else module.logits


def trained(model: nn.Module, x: torch.Tensor, ewa: EWA, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        result(model, x).square().mean().backward()
        optimizer.step()
        ewa.step()


@pytest.mark.parametrize("name", MODELS)
def test_ffns_are_found_trained_and_folded(name):
    make, shape, names = MODELS[name]
    model, x = make(), torch.randn(shape)
    original = copy.deepcopy(model)
    ewa = EWA(model, experts=4, share=LinearRate(0, 0.3, 3))
    assert [str(ffn) for ffn in ewa.ffns] == names
    assert sum(isinstance(m, ExpertLinear) for m in model.modules()) == len(ewa.layers)
    model.train()
    trained(model, x, ewa)
    model.eval()
    with torch.no_grad():
        validated = result(model, x)
        assert ewa.fold() is model
        torch.testing.assert_close(result(model, x), validated)  # eval mode is the fold
    assert str(model) == str(original)
    shapes = [(n, p.shape, p.requires_grad) for n, p in original.named_parameters()]
    assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == shapes
    assert not torch.equal(result(model, x), result(original.eval(), x))


@pytest.mark.parametrize("experts", [2, 3, 4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_a_fold_of_equal_experts_is_the_model_bit_by_bit(name, experts):
    """In training mode too they compute the same, whichever expert a token goes to."""
    make, shape, _ = MODELS[name]
    model, x = make(), torch.randn(shape)
    original = copy.deepcopy(model)
    ewa = EWA(model, experts=experts)
    for module in (*model.modules(), *original.modules()):
        module.training = not isinstance(module, nn.Dropout)
    if name != "torch's encoder":  # its attention drops out by its own flag
        # The sums of a matrix product may be in another order for fewer rows.
        torch.testing.assert_close(result(model, x), result(original, x), rtol=1e-4, atol=1e-5)
    for rate in (0.1, 1.0):
        for layer in ewa.layers.values():
            layer.share(rate)
    ewa.fold()
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@given(
    count=st.integers(2, 6),
    rate=st.floats(0, 1),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sharing_is_the_formula_and_keeps_the_mean(count, rate, seed, dtype):
    stack = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    result = share(stack, rate)
    others = (stack.sum(0) - stack) / (count - 1)
    torch.testing.assert_close(result, (1 - rate) * stack + rate * others, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean(result), mean(stack), rtol=1e-5, atol=1e-5)


def test_equal_experts_stay_equal():
    stack = torch.randn(3, 5).expand(3, 3, 5).clone()
    assert torch.equal(share(stack, 0.3), stack)
    assert torch.equal(mean(stack), stack[0])


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 64])
def test_each_token_meets_one_expert_and_parts_are_even(tokens):
    """Expert e answers e + 1, so the answers show which experts ran; the second layer is the
    same."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    ewa = EWA(model, experts=4)
    up, down = ewa.layers.values()
    ids = torch.arange(1.0, 5)
    with torch.no_grad():
        up.weights.copy_(ids[:, None, None].expand_as(up.weights))
        down.weights.copy_(1 / (2 * ids[:, None, None]).expand_as(down.weights))
    x = torch.randn(tokens, 1)
    torch.testing.assert_close(model(x), x)  # e times 1/e
    if tokens:
        options = up(torch.ones(tokens, 1))[:, 0].round().long()
        counts = torch.bincount(options, minlength=5)[1:]
        assert int(counts.max() - counts.min()) <= 1
        down(torch.ones(tokens, 2))


def test_partitions_differ_from_step_to_step_and_are_repeated_by_checkpointing():
    model = blocks(1).train()
    ewa = EWA(model, experts=4)
    x = torch.randn(2, 8, 8, requires_grad=True)
    with torch.no_grad():
        for layer in ewa.layers.values():
            layer.weights += torch.randn_like(layer.weights)
        assert not torch.equal(model(x), model(x))
    torch.manual_seed(1)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_share_rates():
    assert [LinearRate(0, 0.3, 3)(step) for step in (0, 1, 3, 9)] == pytest.approx(
        [0, 0.1, 0.3, 0.3]
    )
    assert LinearRate(0.1, 0.3, 0)(0) == 0.3
    assert ConstantRate(0.2)(7) == 0.2
    model = blocks(1)
    ewa = EWA(model, share=lambda step: 0.5 * step)
    for _ in range(3):
        ewa.step()
    with pytest.raises(UsageError, match=r"the share rate is 1.5 at step 3, expected 0 to 1"):
        ewa.step()


def test_names_choose_ffns():
    def names(*args, **kwargs):
        return [str(ffn) for ffn in feedforwards(*args, **kwargs)]

    model = blocks(3)
    assert names(model, "1.mlp") == ["1.mlp.0, 1.mlp.2"]
    assert names(model, ["0", "2.*"]) == ["0.mlp.0, 0.mlp.2", "2.mlp.0, 2.mlp.2"]
    narrow = nn.Sequential(nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)))
    assert names(narrow, "0") == ["0.0, 0.2"]
    with pytest.raises(UsageError, match="Sequential has no FFN that could be found"):
        EWA(narrow)
    with pytest.raises(UsageError, match=r"ffns='layer.\*' matches no module of Sequential, which"):
        EWA(model, ffns="layer.*")
    with pytest.raises(UsageError, match=r"ffns='\*.norm': 0.norm \(LayerNorm\) holds no FFN"):
        EWA(model, ffns="*.norm")


def test_refusals():
    model = blocks(1)
    for experts in (1, 2.5, True):
        with pytest.raises(UsageError, match=f"experts is {experts}: give a whole number from 2"):
            EWA(model, experts=experts)
    with pytest.raises(UsageError, match=r"share rate is -0.1 at step 0"):
        EWA(model, share=-0.1)
    assert not any(isinstance(m, ExpertLinear) for m in model.modules())
    ewa = EWA(model)
    with pytest.raises(UsageError, match="already experts: fold them first"):
        EWA(model)
    ewa.fold()
    for call in (ewa.step, ewa.fold):
        with pytest.raises(UsageError, match="experts are already folded: create a new EWA"):
            call()


def test_an_optimizer_made_too_early_is_found():
    model = blocks(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewa = EWA(model)
    model(torch.randn(2, 4, 8)).sum().backward()
    optimizer.step()
    ewa.step()
    with pytest.raises(UsageError, match="no expert has changed in 1 steps: create the optimizer"):
        ewa.fold()


def test_shared_layers_are_refused():
    model = blocks(2)
    model[1].mlp[0].weight = model[0].mlp[0].weight
    with pytest.raises(UsageError, match=r"0.mlp.0 shares its weight with another layer"):
        EWA(model)
    assert len(EWA(nn.Sequential(*[Block()] * 2)).ffns) == 1  # one block, twice in a row


def test_a_model_that_mixes_tokens_inside_is_refused():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).mean(-2))

    model = Mixing()
    EWA(model)
    with pytest.raises(UsageError, match="called with 10 and 2 tokens: experts cannot be assigned"):
        model(torch.randn(2, 5, 8))
