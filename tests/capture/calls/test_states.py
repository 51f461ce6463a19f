"""Modules that write to their buffers: their program has states, and the modules keep their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.capture import capture
from tests.capture.modules import WIDTH, Cached, Counts, Shifts

TOLERANCE = 1e-5  # float32, a handful of sums


def compare(model: nn.Module, compiled: moec.CompiledModel, calls: list[tuple[Any, ...]]) -> None:
    for inputs in calls:
        with torch.no_grad():
            assert torch.allclose(compiled(*inputs), model(*inputs), rtol=0, atol=TOLERANCE)


def test_a_capture_leaves_the_module_as_it_was() -> None:
    model = Counts()
    captured = capture(model, (torch.ones(2, WIDTH),))
    (state,) = captured.program.graph.states
    assert state.before.name == "total"
    first, second = (captured.eager(torch.ones(2, WIDTH))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(model.total, torch.full((WIDTH,), 0.5))
    model.total.zero_()
    assert torch.equal(captured.program.weights["total"], torch.full((WIDTH,), 0.5))
    assert torch.equal(captured.eager(torch.ones(2, WIDTH))[0], first)


def test_a_buffer_that_grows() -> None:
    model = Counts()
    compiled = moec.compile(model, (torch.randn(2, WIDTH),))
    calls = [(torch.randn(n, WIDTH),) for n in (1, 3, 2)]
    compare(model, compiled, calls)
    compiled.reset()
    model.total.fill_(0.5)
    compare(model, compiled, calls)


def test_saving_does_not_disturb_a_state(tmp_path: Any) -> None:
    model = Counts()
    compiled = moec.compile(model, (torch.randn(2, WIDTH),))
    compare(model, compiled, [(torch.randn(2, WIDTH),)])
    compiled.save(tmp_path / "counts.moec")
    compare(model, compiled, [(torch.randn(2, WIDTH),)])
    loaded = moec.load(tmp_path / "counts.moec")
    x = torch.ones(1, WIDTH)
    assert torch.allclose(loaded(x), x + x.sum(0) + 0.5)


def test_a_window_moved_by_slices() -> None:
    model = Shifts()
    compiled = moec.compile(model, (torch.randn(1, WIDTH),), dynamic_shapes={"x": None})
    compare(model, compiled, [(torch.randn(1, WIDTH),) for _ in range(5)])


def test_a_cache_that_is_reached_around_the_module() -> None:
    """The trace finds it as a constant of its own: it is the buffer, and one state."""
    model = Cached()
    compiled = moec.compile(model, (torch.randn(2, WIDTH), torch.tensor([0, 1])))
    (state,) = compiled.captured.program.graph.states
    assert state.before.name == "keys"
    calls = [(torch.randn(1, WIDTH), torch.tensor([at])) for at in range(6)]
    compare(model, compiled, calls)


def test_a_cache_that_is_no_buffer_at_all() -> None:
    class Free(Cached):
        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            (keys,) = self.cache
            keys.index_copy_(0, at, x)
            return x @ keys.T

    model = Free()
    del model.keys
    compiled = moec.compile(model, (torch.randn(2, WIDTH), torch.tensor([0, 1])))
    assert len(compiled.captured.program.graph.states) == 1
    compare(model, compiled, [(torch.randn(1, WIDTH), torch.tensor([at])) for at in range(3)])


def test_a_program_that_somebody_exported_is_not_changed() -> None:
    exported = torch.export.export(Cached(), (torch.randn(1, WIDTH), torch.tensor([0])))
    before = str(exported.graph), list(exported.constants)
    capture(exported)
    assert (str(exported.graph), list(exported.constants)) == before


def test_the_static_cache_of_transformers(short_moe: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = transformers.AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).eval()
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {
        "batch_size": 1,
        "max_cache_len": 16,
        "device": "cpu",
    }
    module = TorchExportableModuleWithStaticCache(
        model, batch_size=1, max_cache_len=16, device="cpu"
    )
    length = torch.export.Dim("S", min=1, max=16)
    ids, positions = torch.tensor([[40, 41, 42, 43]]), torch.arange(4)
    compiled = moec.compile(
        module,
        (),
        {"input_ids": ids, "cache_position": positions},
        dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
    )
    layers = model.config.num_hidden_layers
    assert len(compiled.blocks) == layers
    assert len(compiled.captured.program.graph.states) == 3 * layers  # keys, values, length
    with torch.no_grad():
        one_by_one = [(torch.tensor([[50 + at]]), torch.tensor([at])) for at in range(4, 8)]
        for inputs in [(ids, positions), *one_by_one]:
            expected = module(input_ids=inputs[0], cache_position=inputs[1])
            actual = compiled(input_ids=inputs[0], cache_position=inputs[1])
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


class NormalisedRouter(nn.Module):
    """XMoE (arXiv 2204.09179) as its authors' code has it: each call writes the normalised weights
    of the router into the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = nn.Linear(WIDTH, 4, bias=False)
        self.router = nn.Parameter(torch.randn(3, 4))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.router.mul_(1.5 / self.router.norm(p=2.0, dim=1, keepdim=True))
        routers = nn.functional.normalize(self.router, dim=1, eps=1e-4)
        scores = self.reduction(x) @ routers.T
        finite = scores.isfinite()
        if not finite.all():
            scores[~finite] = scores[finite].min()
        return scores.softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.scores(x).max(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(ids == number)[0]
            result[rows] = weights[rows, None] * expert(x[rows])
        return result


def test_a_parameter_that_each_call_writes() -> None:
    torch.manual_seed(0)
    model = NormalisedRouter().eval()
    before = model.router.detach().clone()
    compiled = moec.compile(model, (torch.randn(6, WIDTH),), verify=False)
    assert torch.equal(model.router, before)
    assert len(compiled.blocks) == 1
    (state,) = compiled.captured.program.graph.states
    assert state.before.name == "router"
    compare(model, compiled, [(torch.randn(n, WIDTH),) for n in (6, 1, 33)])
