"""Router, sort and combine on the emulator against their eager reference in moec.ir.ops."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.cuda.routing.dispatch import combine, dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.errors import NoMatch
from moec.ir.ops.routing.routing import Routing, route_logits
from tests.codegen.cpu.routing.test_route import DEEPSEEK_V3
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    each_schedule,
    emulated,
)
from tests.cuda_emulator.products import TORCH, UNIT

SHORT = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROUTINGS: dict[str, RouteSpec] = {
    "mixtral": RouteSpec(Routing(2, renormalize=True), 8, "f32"),
    "qwen": RouteSpec(Routing(8, scale=1.5, dtype="bf16"), 60, "bf16"),
    "gpt-oss": RouteSpec(Routing(4, score="none", after="softmax"), 32, "f32"),
    "llama4": RouteSpec(Routing(1, score="none", after="sigmoid", dtype="f16"), 16, "f16"),
    "deepseek-v2": RouteSpec(Routing(6, groups=8, top_groups=3, scale=16.0), 160, "f32"),
    "deepseek-v3": RouteSpec(DEEPSEEK_V3, 256, "f32", "f32"),
    "all": RouteSpec(Routing(5, renormalize=True), 5, "f32", "bf16"),
    "rounded": RouteSpec(
        Routing(
            3,
            score="sigmoid",
            groups=4,
            top_groups=2,
            group_score="top2sum",
            dtype="f16",
            score_dtype="f16",
            choice_dtype="f16",
        ),
        24,
        "f16",
        "f16",
    ),
    "phimoe": RouteSpec(Routing(2, score="sparsemixer", jitter=0.1), 40, "f32"),
    "many": RouteSpec(Routing(20, score="sigmoid", after="softmax"), 37, "f32"),
}


# ---- route -----------------------------------------------------------------------------


@cache
def router(spec: RouteSpec) -> Emulated:
    return emulated(route(spec, SM_80))


def distinct(tokens: int, experts: int) -> Tensor:
    """Logits whose scores stay apart: exp or its sum, rounded otherwise, must not swap any."""
    order = torch.rand(tokens, experts).argsort(-1).float()
    return (order + torch.rand(tokens, experts) * 0.5) * (12.0 / experts) - 4


def check_route(spec: RouteSpec, logits: Tensor, schedule: Schedule = SCHEDULES[0]) -> None:
    logits = logits.to(SHORT[spec.logits])
    correction = None
    if spec.correction is not None:
        correction = (torch.randn(spec.num_experts) * 0.01).to(SHORT[spec.correction])
    shape = (len(logits), spec.routing.k)
    weights = torch.full(shape, 7, dtype=SHORT[spec.routing.dtype])
    experts = torch.full(shape, -7)
    inputs = [logits] if correction is None else [logits, correction]
    router(spec)(*inputs, weights, experts, schedule=schedule)
    eager_weights, eager_experts = route_logits(spec.routing, logits, correction)
    assert torch.equal(experts, eager_experts)
    # f32: exp to 2 ulp, sums of E in another order; else one more rounding of the result.
    rtol = {"f32": 1e-5, "bf16": 2.0**-7, "f16": 2.0**-10}[spec.routing.dtype]
    torch.testing.assert_close(weights, eager_weights, rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routers(name: str) -> None:
    spec = ROUTINGS[name]
    for tokens, schedule in zip((0, 1, 3, 6), SCHEDULES, strict=True):
        check_route(spec, distinct(tokens, spec.num_experts), schedule)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(["f32", "bf16", "f16"]),
    logits=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -3.0, torch.inf, -torch.inf, torch.nan]),
        min_size=8,
        max_size=8,
    ),
    schedule=st.sampled_from(SCHEDULES),
)
def test_ties_infinities_and_nan(dtype: str, logits: list[float], schedule: Schedule) -> None:
    check_route(RouteSpec(Routing(3, score="none"), 8, dtype), torch.tensor([logits]), schedule)
    check_route(ROUTINGS["mixtral"], torch.tensor([logits]), schedule)


def test_equal_groups_go_to_the_lower_one() -> None:
    spec = RouteSpec(Routing(4, score="none", groups=4, top_groups=2), 16, "f32")
    check_route(spec, torch.tensor([[1.0, 0, 0, 2] * 4]))


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (Routing(40), "40 choices of a token are more than the lanes of a warp"),
        (Routing(2, groups=64, top_groups=2), "64 groups are more than the lanes of a warp"),
    ],
)
def test_routers_without_a_kernel(routing: Routing, words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        route(RouteSpec(routing, 64, "f32"), SM_80)


# ---- dispatch --------------------------------------------------------------------------


@cache
def sorter(num_experts: int, top_k: int) -> Emulated:
    return emulated(dispatch(DispatchSpec(num_experts, top_k), SM_80))


def check_sort(experts: Tensor, num_experts: int, schedule: Schedule) -> None:
    tokens, k = experts.shape
    order = torch.full((tokens * k,), -7, dtype=torch.int32)
    slots = torch.full((tokens, k), -7, dtype=torch.int32)
    ends = torch.full((num_experts,), -7, dtype=torch.int32)
    sorter(num_experts, k)(experts, order, slots, ends, schedule=schedule)
    owners = torch.where((experts >= 0) & (experts < num_experts), experts, num_experts).flatten()
    expected = owners.sort(stable=True).indices
    assert torch.equal(order.long(), expected)
    assert torch.equal(slots.flatten()[expected].long(), torch.arange(tokens * k))
    counts = owners.bincount(minlength=num_experts + 1)[:num_experts]
    assert torch.equal(ends.long(), counts.cumsum(0))


@settings(max_examples=30)
@given(choices=st.lists(st.integers(-1, 6), max_size=60), schedule=st.sampled_from(SCHEDULES))
def test_any_choices(choices: list[int], schedule: Schedule) -> None:
    experts = torch.tensor(choices[: len(choices) // 3 * 3], dtype=torch.int64).reshape(-1, 3)
    check_sort(experts, 5, schedule)


@settings(max_examples=10)
@given(tokens=st.integers(0, 9), schedule=st.sampled_from(SCHEDULES))
def test_tokens_that_take_every_expert(tokens: int, schedule: Schedule) -> None:
    check_sort(torch.rand(tokens, 3).argsort(1), 3, schedule)


@each_schedule
def test_more_choices_than_threads(schedule: Schedule) -> None:
    """Three stretches of 512, the last one short; nearly all on one expert."""
    experts = torch.randint(0, 40, (600, 2))
    check_sort(torch.where(torch.rand(600, 2) < 0.7, 7, experts), 40, schedule)


def test_many_experts_leave_fewer_warps() -> None:
    check_sort(torch.randint(0, 3001, (40, 2)), 3000, SCHEDULES[1])


# ---- combine ---------------------------------------------------------------------------


@cache
def bringer(spec: CombineSpec) -> Emulated:
    return emulated(combine(spec, SM_80))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("width", [1, 37, 300])
@pytest.mark.parametrize("plain", [False, True], ids=["weighted", "plain"])
def test_rows_come_back(dtype: str, width: int, plain: bool) -> None:
    k = 4
    kind = None if plain else dtype
    spec = CombineSpec(3, k, width, dtype, dtype, kind, kind)
    for tokens, schedule in zip((0, 1, 3, 5), SCHEDULES, strict=True):
        owned = tokens * k * 2 // 3
        y = torch.randn(tokens * k, width).to(TORCH[dtype])
        y[owned:] = torch.nan  # what nobody owns must not be read
        slots = torch.randperm(tokens * k).int().reshape(tokens, k)
        ends = torch.tensor([0, owned // 2, owned], dtype=torch.int32)
        weights = torch.rand(tokens, k).to(TORCH[dtype])
        weights[slots >= owned] = torch.inf
        addend = torch.randn(tokens, width).to(TORCH[dtype])
        out = torch.full((tokens, width), torch.nan, dtype=TORCH[dtype])
        more = [] if plain else [weights, addend]
        bringer(spec)(y, slots, ends, *more, out, schedule=schedule)
        scale = torch.ones(tokens, k) if plain else weights.nan_to_num(posinf=0.0)
        parts = y.double()[slots.long()] * scale.double().unsqueeze(-1)
        exact = torch.where((slots < owned).unsqueeze(-1), parts, 0.0).sum(1)
        exact = exact if plain else exact + addend.double()
        allowed = UNIT[TORCH[dtype]] * exact.abs() + 6 * 2.0**-24 * 8
        assert ((out.double() - exact).abs() <= allowed).all()
