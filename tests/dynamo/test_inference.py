"""Blocks of plain modules run on moec's kernels, for all sizes, with unpacked weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.dynamo import FallbackError, FallbackWarning, backend
from moec.dynamo.skipped import watch
from tests.dynamo.modules import Gathered, Listed, Masked, Model
from tests.passes.forms import rows
from tests.passes.forms.sizes import D

# float32 sums of a few dozen terms in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="moec", dynamic=True, options={"rest": "eager", "strict": True, **options}
    )


@pytest.mark.parametrize("form", [Gathered, Listed])
def test_forms_are_replaced_without_preparation(form: type[nn.Module]) -> None:
    model = form().eval()
    run = compiled(model)
    with torch.no_grad():
        for tokens in (5, 2, 33):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert moec.stats().blocks == 1


def test_one_compilation_serves_ten_token_counts() -> None:
    model = Model().eval()
    run = compiled(model)
    with torch.no_grad():
        for batch, length in zip((2, 3, 4, 5, 2, 7, 3, 2, 9, 2), range(3, 33, 3), strict=True):
            x = torch.randn(batch, length, 16)
            torch.testing.assert_close(run(x), model(x), **CLOSE)
    stats = moec.stats()
    assert (stats.compilations, stats.blocks, stats.fallbacks) == (1, 2, ())
    assert (stats.code_compiled, stats.cache_hits, stats.packs) == (1, 1, 2)


def test_no_guards_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.dynamo import compiler

    guards: list[tuple[int, int]] = []
    original = compiler.replace_blocks

    def counted(*inputs: Any) -> Any:
        environment = torch._guards.TracingContext.get().fake_mode.shape_env
        before = len(environment.guards)
        result = original(*inputs)
        guards.append((before, len(environment.guards)))
        return result

    monkeypatch.setattr(compiler, "replace_blocks", counted)
    with torch.no_grad():
        compiled(Masked().eval())(torch.randn(3, 5, 16))
    ((before, after),) = guards
    assert before == after


def test_weights_are_packed_again_when_they_change() -> None:
    model = Masked().eval()
    run = compiled(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), **CLOSE)
        model.gate.mul_(1.5)  # another version
        torch.testing.assert_close(run(x), model(x), **CLOSE)
        model.down.data = torch.randn_like(model.down)  # other memory
        torch.testing.assert_close(run(x), model(x), **CLOSE)
        assert moec.stats().packs == 3
        run(x)
        assert moec.stats().packs == 3
    assert moec.stats().compilations == 1


def test_two_models_of_one_shape_keep_their_weights() -> None:
    first, second = Masked().eval(), Masked().eval()
    run_first, run_second = compiled(first), compiled(second)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run_first(x), first(x), **CLOSE)
            torch.testing.assert_close(run_second(x), second(x), **CLOSE)


def test_half_precision_is_the_modules_own() -> None:
    model = Masked().eval().bfloat16()
    run = compiled(model)
    x = torch.randn(2, 9, 16).bfloat16()
    with torch.no_grad():
        y = run(x)
        exact = copy.deepcopy(model).float()(x.float())
    assert y.dtype is torch.bfloat16
    # One rounding of the result, and few inside: a bfloat16 has 8 bits.
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)


def test_inference_mode() -> None:
    model = Masked().eval()
    run = compiled(model)
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x), **CLOSE)


def test_writes_into_inputs_and_buffers_stay() -> None:
    class Counts(Masked):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = super().forward(x)
            x.mul_(2)
            return y

    model, other = Counts().eval(), Counts().eval()
    other.load_state_dict(model.state_dict())
    run = compiled(model)
    actual, theirs = torch.ones(2, 3, 16), torch.ones(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(actual), other(theirs), **CLOSE)
        run(actual)
    assert model.calls == 2
    torch.testing.assert_close(actual, torch.full_like(actual, 4))


def test_a_dense_model_is_left_alone_silently() -> None:
    run = compiled(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
    with torch.no_grad():
        run(torch.randn(3, 16))
    assert (moec.stats().blocks, moec.stats().fallbacks) == (0, ())


class Mixed(nn.Module):
    """Chooses, and then weighs all that it knows: no expert is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        best, _ = self.router(x).topk(2, -1)
        return sum(expert(x) for expert in self.experts) * best.sum(-1, keepdim=True)


def test_a_fallback_is_one_warning_with_its_reason() -> None:
    model = Mixed().eval()
    run = compiled(model, strict=False)
    x = torch.randn(3, 16)
    with torch.no_grad(), pytest.warns(FallbackWarning, match="no experts were found") as record:
        torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert len(record) == 1
    (fallback,) = moec.stats().fallbacks
    assert "moec.prepare(model)" in fallback.reason


def test_strict_raises_instead() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="no experts were found") as raised:
        compiled(Mixed().eval())(torch.randn(3, 16))
    assert FallbackError.__name__ in str(raised.value)


class Mapped(Masked):
    """Behind a vmap over its tokens, as associative scans are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.vmap(lambda row: row * row.sigmoid())(x))


def test_a_vmap_is_refused_with_its_reason_and_left_as_it_was() -> None:
    model, x = Mapped().eval(), torch.randn(3, 16)
    run = compiled(model, strict=False)
    with torch.no_grad(), pytest.warns(FallbackWarning, match="the graph has a vmap"):
        torch.testing.assert_close(run(x), model(x), **CLOSE)


def test_autocast_is_refused_with_its_reason() -> None:
    run = compiled(Masked().eval(), strict=False)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(FallbackWarning, match="autocast is on"),
    ):
        run(torch.randn(2, 3, 16))


class Offset(Masked):
    """Compares choices with ids that a buffer holds."""

    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ids", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 16)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        y = torch.zeros_like(rows)
        for expert in range(4):
            share = ((chosen == self.ids[expert]) * weights).sum(-1, keepdim=True)
            y = y + (rows @ self.gate[expert].T).relu() @ self.down[expert].T * share
        return y


@pytest.mark.parametrize("mode", ["inference", "training", "inference tensors"])
def test_a_changed_mask_is_refused(mode: str) -> None:
    with (
        torch.inference_mode(mode == "inference tensors"),
        torch.set_grad_enabled(mode == "training"),
    ):
        model = Offset()
        run = compiled(model)
        x = torch.randn(2, 3, 16)
        torch.testing.assert_close(run(x), model(x).view(-1, 16), **CLOSE)
        model.load_state_dict(model.state_dict())  # another version, the same ids
        torch.testing.assert_close(run(x), model(x).view(-1, 16), **CLOSE)
        model.ids.copy_(model.ids.flip(0))
        with pytest.raises(RuntimeError, match="ids or masks changed"):
            run(x)


def test_inductor_takes_the_rest() -> None:
    model = Masked().eval()
    run = compiled(model, rest="inductor")
    with torch.no_grad():
        for tokens in (3, 8):
            x = torch.randn(2, tokens, 16)
            torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert (moec.stats().compilations, moec.stats().blocks) == (1, 1)


class Looped(Listed):
    """For each expert, a loop finds the tokens that chose it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


@pytest.mark.parametrize("how", ["prepared", "setting", "fullgraph"])
def test_a_loop_over_chosen_tokens_where_dynamo_captures_it(how: str) -> None:
    model, eager = Looped().eval(), Looped().eval()
    eager.load_state_dict(model.state_dict())
    capture = "capture_dynamic_output_shape_ops"
    if how != "setting":
        moec.prepare(moec.prepare(model))
    run = torch.compile(
        model,
        backend="moec",
        dynamic=True,
        fullgraph=how == "fullgraph",
        options={"rest": "eager", "strict": True},
    )
    with torch.no_grad(), torch._dynamo.config.patch({capture: how == "setting"}):
        for tokens in (5, 9):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(run(x), eager(x), **CLOSE)
        assert getattr(torch._dynamo.config, capture) is (how == "setting")
    assert (moec.stats().compilations, moec.stats().blocks) == (1, 1)


class Around(nn.Module):
    """A block that is only a part of the model: the ops before and after it reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(16, 16), Looped()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.before(x)) + x
        return y


@pytest.mark.parametrize("form", [Looped, Around])
def test_what_dynamo_skips_is_said_once_by_name(form: type[nn.Module]) -> None:
    watch(backend)  # Dynamo's reset forgot it
    model = form().eval()
    run = compiled(model)
    with torch.no_grad():
        with pytest.warns(FallbackWarning, match=r"Looped: .*moec\.prepare\(model\)") as record:
            run(torch.randn(5, 16))
        assert len(record) == 1
        x = torch.randn(9, 16)
        torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert [fallback.where for fallback in moec.stats().fallbacks] == ["Looped"]


def test_a_loop_that_asks_whether_a_mask_is_set_is_named() -> None:
    watch(backend)
    run = torch.compile(moec.prepare(rows.Asked().eval()), backend="moec")
    with torch.no_grad(), pytest.warns(FallbackWarning) as record:
        run(torch.randn(5, D))
    message = " ".join(str(warning.message) for warning in record)
    assert re.search(r"Asked: Dynamo skips the function, so .* branches on a mask", message)
    assert "no experts were found in it" in message  # the router, which Python calls alone then


@pytest.mark.parametrize("form", [Gathered, Listed, Masked])
def test_no_tokens_are_nothing_to_leave_to_pytorch(form: type[nn.Module]) -> None:
    model = form().eval()
    run = compiled(model)  # strict
    with torch.no_grad():
        for count in (0, 5, 0):
            x = torch.randn(count, 16)
            torch.testing.assert_close(run(x), model(x), **CLOSE)
    assert (moec.stats().blocks, moec.stats().fallbacks) == (1, ())


def test_who_listens_is_told_again_after_a_reset() -> None:
    handlers: Any = torch._dynamo.callback_handler
    moec.prepare(nn.Linear(4, 4))
    moec.prepare(nn.Linear(4, 4))
    assert len(handlers.end_callbacks) == 1
    torch._dynamo.reset()
    torch.compile(nn.Linear(4, 4), backend="moec", options={"rest": "eager"})(torch.randn(2, 4))
    assert len(handlers.end_callbacks) == 1


def test_what_another_backend_is_not_given_is_not_ours_to_say() -> None:
    watch(backend)
    with torch.no_grad():
        torch.compile(Looped().eval(), backend="eager")(torch.randn(5, 16))
    assert moec.stats().fallbacks == ()


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own() -> None:
    model = moec.prepare(Looped().eval())
    other = copy.deepcopy(model)
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))
        other.router.weight.zero_()
        assert not torch.equal(other(x), model(x))
