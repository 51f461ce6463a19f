"""Loops over experts that Dynamo cannot capture are recognised by their behaviour, or reported."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.dynamo.captured_layers import CapturedLayer, is_captured
from moec.dynamo.record import FallbackWarning
from tests.dynamo.modules import Listed
from tests.dynamo.test_inference import CLOSE

D, E, K = 16, 4, 2


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)) for _ in range(E)
        )


class Branching(Experts):
    """Leaves out experts without tokens by their number."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.gate(flat).softmax(-1).topk(K, -1)
        y = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                y.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return y.view_as(x)


class Counted(Experts):
    """DeepSeek's inference: counts are read into a list, and rows are cut by them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(K, -1)
        order = chosen.flatten().argsort(stable=True)
        results, start = [], 0
        for index, count in enumerate(torch.bincount(chosen.flatten(), minlength=E).tolist()):
            if count == 0:
                continue
            results.append(self.experts[index](x[order[start : start + count] // K]))
            start += count
        rows = torch.empty(len(order), D).index_copy(0, order, torch.cat(results))
        return (rows.view(-1, K, D) * weights[..., None]).sum(1), logits


class Noisy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(D, D), Branching()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = x + scale * self.block(self.before(x))
        return y


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager", **options})


def example() -> Tensor:
    return torch.randn(7, D)


@pytest.fixture(scope="module")
def prepared() -> Around:
    return moec.prepare(Around().eval(), example())


def check_block(model: nn.Module) -> None:
    """`model` is prepared; its class has the forward of eager mode."""
    eager = type(model)().eval()
    eager.load_state_dict(model.state_dict())
    run = compiled(model, strict=True)
    with torch.no_grad():
        for tokens in (7, 2, 33):
            x = torch.randn(tokens, D)
            torch.testing.assert_close(run(x), eager(x), **CLOSE)
            torch.testing.assert_close(model(x), eager(x), **CLOSE)
    assert moec.stats().blocks == moec.stats().compilations == 1
    assert not moec.stats().fallbacks


def test_a_loop_that_branches_on_numbers_of_rows(prepared: Around) -> None:
    check_block(copy.deepcopy(prepared))


def test_a_loop_over_counts() -> None:
    check_block(moec.prepare(Counted().eval(), example()))


def test_only_the_module_with_the_loop_is_replaced(prepared: Around) -> None:
    observed = [name for name, part in prepared.named_modules() if is_captured(part)]
    assert observed == ["block"]


def test_a_loop_that_dynamo_captures_stays_as_it_is() -> None:
    model = moec.prepare(Listed().eval(), torch.randn(7, 16))
    assert not any(map(is_captured, model.modules()))


def test_calls_of_another_kind_run_the_modules_own_forward(prepared: Around) -> None:
    block = copy.deepcopy(prepared.block)
    observed, x = block.__dict__["moec_layer"], example()
    assert isinstance(observed, CapturedLayer)
    assert observed.covers(block, (x,), {})
    assert not observed.covers(block, (x[None],), {})
    assert not observed.covers(block, (x.bfloat16(),), {})
    assert not observed.covers(block, (), {"x": x})
    assert not observed.covers(block.train(), (x,), {})
    assert torch.equal(block(x), Branching.forward(block, x))


def test_a_copy_has_weights_of_its_own(prepared: Around) -> None:
    block, other, x = prepared.block, copy.deepcopy(prepared.block), example()
    with torch.no_grad():
        for expert in other.experts:
            expert[2].weight.mul_(2)
        for part in (block, other):
            torch.testing.assert_close(part(x), Branching.forward(part, x), **CLOSE)
        assert not torch.allclose(block(x), other(x))


def test_gradients(prepared: Around) -> None:
    model, eager, x = copy.deepcopy(prepared), Around().eval(), example()
    eager.load_state_dict(model.state_dict())
    F.mse_loss(compiled(model)(x), x).backward()
    F.mse_loss(eager(x), x).backward()
    for actual, right in zip(model.parameters(), eager.parameters(), strict=True):
        # eager skips an expert without tokens and leaves None
        grad = torch.zeros_like(right) if right.grad is None else right.grad
        torch.testing.assert_close(actual.grad, grad, **CLOSE)


def test_what_is_not_recognised_is_named() -> None:
    with pytest.warns(FallbackWarning) as record:
        moec.prepare(Noisy().eval(), torch.randn(5, D))
    assert "Noisy: Dynamo does not capture it, and neither does moec: " in str(record[0].message)


def test_without_a_call_a_branch_is_left_to_pytorch() -> None:
    """Dynamo raises its own error here under the setting that a prepared model enables."""
    model, eager = Branching().eval(), Branching().eval()
    eager.load_state_dict(model.state_dict())
    run = compiled(moec.prepare(model))
    x = torch.randn(5, D)
    with torch.no_grad():
        with pytest.warns(FallbackWarning) as record:
            assert torch.equal(run(x), eager(x))
        assert torch.equal(run(x), eager(x))
    message = " ".join(str(warning.message) for warning in record)
    assert re.search(
        r"Branching: Dynamo cannot capture a branch on the number of an expert's tokens "
        r"`if token.numel\(\):` \(.*test_captured_layers\.py:\d+\): .*moec\.prepare\(model, x\)",
        message,
    )
    assert sum("cannot capture a branch" in f.reason for f in moec.stats().fallbacks) == 1


def _choose_one(block: Numbered) -> None:
    block.count = 1


def _bend(block: Branching) -> None:
    block.experts[1][1] = nn.Sequential(nn.GELU(), nn.Tanh())


def _hook(block: Branching) -> None:
    block.experts[0].register_forward_hook(lambda module, args, result: 2 * result)


def _patch(block: Branching) -> None:
    block.experts[2].forward = _doubled(block.experts[2].forward)


def _doubled(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * forward(x)


def _replace(block: Branching) -> None:
    block.experts[0] = nn.Identity()


def _nest(block: Branching) -> None:
    """As adapters do: the layer becomes a part of another."""
    for expert in block.experts:
        expert[0] = nn.Sequential(expert[0], nn.Linear(24, 24))


class Numbered(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.count = K

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.count, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if token.numel():
                y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


@pytest.fixture(scope="module")
def numbered() -> Numbered:
    return moec.prepare(Numbered().eval(), example())


@pytest.mark.parametrize("change", [_choose_one, _bend, _hook, _patch, _replace, _nest])
def test_a_module_that_changed_runs_its_own_forward(
    numbered: Numbered, change: Callable[[Any], None]
) -> None:
    block, x = copy.deepcopy(numbered), example()
    observed = block.__dict__["moec_layer"]
    with torch.no_grad():
        before = block(x)
        assert observed.covers(block, (x,), {})
        change(block)
        assert not observed.covers(block, (x,), {})
        assert torch.equal(block(x), Numbered.forward(block, x))
        assert not torch.allclose(block(x), before)


@pytest.mark.parametrize("change", [_choose_one, _patch])
def test_a_change_after_compilation_is_seen(
    numbered: Numbered, change: Callable[[Any], None]
) -> None:
    block, x = copy.deepcopy(numbered), example()
    run = compiled(block)
    with torch.no_grad():
        torch.testing.assert_close(run(x), Numbered.forward(block, x), **CLOSE)
        change(block)
        with pytest.warns(FallbackWarning):
            torch.testing.assert_close(run(x), Numbered.forward(block, x), **CLOSE)
    assert moec.stats().blocks == 1


def test_a_forward_of_the_instance_is_kept() -> None:
    """accelerate sets one."""
    model, x = Listed().eval(), torch.randn(5, D)
    expected = model(x)
    for _ in range(2):
        model.forward = _doubled(model.forward)
        expected = 2 * expected
        assert torch.equal(moec.prepare(moec.prepare(model))(x), expected)


def test_preparing_with_a_call_after_preparing_without_one() -> None:
    block, x = moec.prepare(Branching().eval()), example()
    moec.prepare(moec.prepare(block, x))
    assert is_captured(block)
    with torch.no_grad():
        torch.testing.assert_close(block(x), Branching.forward(block, x), **CLOSE)
        torch.testing.assert_close(block(x[None]), Branching.forward(block, x[None]), **CLOSE)


class Storing(Branching):
    """Stores what a training loop reads after the call."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux_loss = y.square().mean()
        return y


class ScaledByAttribute(Branching):
    """Reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.full((D,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class ScaledByItem(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [torch.full((D,), 2.0)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors[0]


class Dropping(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class FirstLength(Branching):
    """Its first call's length decides what later calls compute."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = 1 / x.shape[-2]
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Storing, "its calls set self.aux_loss, which a graph does not do"),
        (FirstLength, "FirstLength cannot be captured"),
        (ScaledByItem, "neither a parameter nor a buffer"),
        (ScaledByAttribute, r"a tensor \(factor\) .*: register it as a buffer"),
    ],
)
def test_modules_with_state_keep_their_forward(kind: type[nn.Module], reason: str) -> None:
    module = kind().eval()
    with pytest.warns(FallbackWarning, match=reason):
        moec.prepare(module, torch.randn(6, D))
    assert not is_captured(module)
    assert not hasattr(module, "scale")


def test_training_mode() -> None:
    """A graph is that of evaluation: it is taken where training computes the same."""
    module, x = moec.prepare(Branching().train(), example()), example()
    assert is_captured(module)
    assert all(part.training for part in module.modules())
    torch.testing.assert_close(module(x), Branching.forward(module, x), **CLOSE)
    with pytest.warns(FallbackWarning, match="Dynamo does not capture it, and neither does moec"):
        dropping = moec.prepare(Dropping().train(), x)
    assert not is_captured(dropping)


class Stateful(Storing):
    """Reads what its earlier calls left."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.history = 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.history.append(len(x))
        return super().forward(x) * self.count + sum(self.history)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore::moec.dynamo.record.FallbackWarning")
def test_state_goes_on_as_in_eager(prepared: bool) -> None:
    torch.manual_seed(0)
    module = Stateful().eval()
    eager = copy.deepcopy(module)
    if prepared:
        moec.prepare(module, torch.randn(6, D))
    compiled = torch.compile(module, backend="moec")
    for tokens in (6, 9, 1, 6):
        x = torch.randn(tokens, D)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-4)
        assert (module.count, module.history) == (eager.count, eager.history)
        torch.testing.assert_close(module.aux_loss, eager.aux_loss, **CLOSE)
