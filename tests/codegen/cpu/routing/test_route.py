"""The route and gate kernels against their eager reference in moec.ir.ops."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.routing.gate import gate
from moec.codegen.cpu.routing.route import route
from moec.codegen.specs.routing import GateSpec, RouteSpec
from moec.ir.ops.routing.routing import Routing, route_logits
from moec.target.cpu import TARGETS, CpuTarget, host
from tests.codegen.cpu.attention.test_attention import TORCH as SHORT
from tests.codegen.cpu.attention.test_attention import shared

TORCH = SHORT | {"f64": torch.float64}
DEEPSEEK_V3 = Routing(
    8,
    score="sigmoid",
    renormalize=True,
    epsilon=1e-20,
    scale=2.5,
    groups=8,
    top_groups=4,
    group_score="top2sum",
)
ROUTINGS: dict[str, tuple[Routing, int, str | None]] = {
    "mixtral": (Routing(2, renormalize=True), 8, None),
    "mixtral-bf16": (Routing(2, renormalize=True, dtype="bf16"), 8, None),
    "qwen": (Routing(8, scale=1.5), 60, None),
    "gpt-oss": (Routing(4, score="none", after="softmax"), 32, None),
    "llama4": (Routing(1, score="none", after="sigmoid"), 16, None),
    "deepseek-v2": (Routing(6, groups=8, top_groups=3, scale=16.0), 160, None),
    "deepseek-v3": (DEEPSEEK_V3, 256, "f32"),
    "glm": (
        Routing(
            3,
            score="sigmoid",
            renormalize=True,
            groups=4,
            top_groups=1,
            group_score="top2sum",
        ),
        12,
        "bf16",
    ),
    "f64": (Routing(3, score="sigmoid", renormalize=True, dtype="f64"), 13, "f64"),
    "all": (Routing(5, renormalize=True), 5, "f32"),
    "many": (Routing(20, score="sigmoid", after="softmax"), 37, None),
    "rounded": (Routing(3, score_dtype="bf16", dtype="bf16"), 16, None),
    "rounded-groups": (
        Routing(
            3,
            score="sigmoid",
            groups=4,
            top_groups=2,
            group_score="top2sum",
            dtype="bf16",
            score_dtype="bf16",
            choice_dtype="bf16",
        ),
        24,
        "bf16",
    ),
    "phimoe": (Routing(2, score="sparsemixer", jitter=0.01), 16, None),
    "phimoe-wide": (Routing(2, score="sparsemixer", jitter=0.5), 19, None),
}


@cache
def kernel(spec: RouteSpec) -> tvm.runtime.Module:
    return compile_kernels(route(spec, host()), target=host())


def run(spec: RouteSpec, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (len(logits), spec.routing.k)
    weights = torch.full(shape, 7, dtype=TORCH[spec.routing.dtype])
    experts = torch.full(shape, -7)
    inputs = [logits] if correction is None else [logits, correction]
    kernel(spec)["route"](*map(shared, [*inputs, weights, experts]))
    return weights, experts


def check(spec: RouteSpec, logits: Tensor, correction: Tensor | None) -> None:
    weights, experts = run(spec, logits, correction)
    want_weights, want_experts = route_logits(spec.routing, logits, correction)
    assert torch.equal(experts, want_experts)
    # f32: exp to 2 ulp, sums of E in another order; else one more rounding of the result,
    # which may fall on the other side.
    rtol = {"f64": 1e-5, "f32": 1e-5, "bf16": 2.0**-7, "f16": 2.0**-10}[spec.routing.dtype]
    torch.testing.assert_close(weights, want_weights, rtol=rtol, atol=1e-30, equal_nan=True)


def spec_of(name: str, logits: str = "f32") -> RouteSpec:
    routing, experts, correction = ROUTINGS[name]
    return RouteSpec(routing, experts, logits, correction)


def random_correction(spec: RouteSpec) -> Tensor | None:
    if spec.correction is None:
        return None
    return torch.randn(spec.num_experts).to(TORCH[spec.correction])


def distinct(tokens: int, experts: int) -> Tensor:
    """Logits whose scores stay apart: exp or its sum, rounded otherwise, must not swap any."""
    order = torch.rand(tokens, experts).argsort(-1).float()
    return (order + torch.rand(tokens, experts) * 0.5) * (12.0 / experts) - 4


@pytest.mark.parametrize("name", ROUTINGS)
def test_matches_eager(name: str) -> None:
    torch.manual_seed(0)
    spec = spec_of(name)
    for tokens in (0, 1, 17, 40):
        correction = random_correction(spec)
        check(spec, distinct(tokens, spec.num_experts), correction)


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_takes_logits_of_any_float(dtype: str) -> None:
    spec = spec_of("gpt-oss", dtype)
    logits = torch.randn(33, spec.num_experts).to(TORCH[dtype])
    check(spec, logits, None)


VALUES = [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 80.0, -80.0, torch.inf, -torch.inf, torch.nan]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ties_nan_and_infinities(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(ROUTINGS)))
    spec = spec_of(name)
    values = data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=6))
    tokens = data.draw(st.integers(0, 3))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(values), (tokens, spec.num_experts), generator=generator)
    correction = None if spec.correction is None else torch.zeros(spec.num_experts)
    if correction is not None and spec.correction is not None:
        correction = correction.to(TORCH[spec.correction])
    check(spec, torch.tensor(values)[pick], correction)


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "phimoe", "many"])
def test_any_nan_chooses_valid_experts(name: str) -> None:
    spec = spec_of(name)
    logits = torch.full((3, spec.num_experts), torch.nan)
    logits[1, ::2] = 0
    _, experts = run(spec, logits, random_correction(spec))
    assert (experts >= 0).all()
    assert (experts < spec.num_experts).all()
    assert (experts.sort(-1).values.diff(dim=-1) > 0).all()


def test_minus_zero_equals_zero() -> None:
    spec = spec_of("gpt-oss")
    logits = torch.zeros(1, 32)
    logits[0, ::2] = -0.0
    _, experts = run(spec, logits, None)
    assert experts.tolist() == [[0, 1, 2, 3]]


def test_a_correction_chooses_but_does_not_weigh() -> None:
    spec = RouteSpec(Routing(1, score="sigmoid"), 4, "f32", "f32")
    weights, experts = run(spec, torch.zeros(1, 4), torch.tensor([0.0, 0.0, 9.0, 0.0]))
    assert experts.item() == 2
    assert weights.item() == 0.5


@pytest.mark.parametrize("target", ["generic", "avx2"])
def test_narrower_targets_agree(target: str) -> None:
    torch.manual_seed(0)
    spec = spec_of("deepseek-v3")
    lib = compile_kernels(route(spec, TARGETS[target]), target=TARGETS[target])
    logits, correction = distinct(5, 256), torch.zeros(256)
    weights, experts = torch.zeros(5, 8), torch.zeros(5, 8, dtype=torch.int64)
    lib["route"](*map(shared, [logits, correction, weights, experts]))
    want = route_logits(spec.routing, logits, correction)
    assert torch.equal(experts, want[1])
    torch.testing.assert_close(weights, want[0], rtol=1e-5, atol=0)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="k=5 of 4 experts"):
        RouteSpec(Routing(5), 4, "f32")
    with pytest.raises(ValueError, match="10 experts are not 4 equal groups"):
        RouteSpec(Routing(2, groups=4), 10, "f32")


GATES: dict[str, GateSpec] = {
    "mixtral-bf16": GateSpec(RouteSpec(ROUTINGS["mixtral"][0], 8, "bf16"), 64, "bf16", "bf16"),
    "qwen-f32": GateSpec(RouteSpec(ROUTINGS["qwen"][0], 60, "f32"), 37, "f32", "f32"),
    "gpt-oss": GateSpec(RouteSpec(ROUTINGS["gpt-oss"][0], 32, "bf16"), 50, "bf16", "bf16", "bf16"),
    "deepseek-v3": GateSpec(
        RouteSpec(ROUTINGS["deepseek-v3"][0], 256, "f32", "f32"), 96, "bf16", "f32"
    ),
    "f16": GateSpec(RouteSpec(ROUTINGS["all"][0], 5, "f16"), 24, "f16", "f16", "f32"),
}


@cache
def gate_kernel(spec: GateSpec, target: CpuTarget) -> tvm.runtime.Module:
    return compile_kernels(gate(spec, target), target=target)


def check_gate(spec: GateSpec, target: CpuTarget, tokens: int) -> None:
    """Weights against those of the experts that the kernel chose: near a tie, either is right."""
    routing, count = spec.route.routing, spec.route.num_experts
    x = torch.randn(tokens, spec.width).to(TORCH[spec.x])
    weight = torch.randn(count, spec.width).to(TORCH[spec.weight])
    bias = torch.randn(count).to(TORCH[spec.bias]) if spec.bias else None
    correction = random_correction(spec.route)
    weights = torch.zeros(tokens, routing.k, dtype=TORCH[routing.dtype])
    experts = torch.full((tokens, routing.k), -7)
    inputs = [t for t in (x, weight, bias, correction) if t is not None]
    gate_kernel(spec, target)["gate"](*map(shared, [*inputs, weights, experts]))

    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # One rounding to the logits' dtype, and sums of D: few near the boundary of two floats.
    unit = {"f32": 2.0**-20, "bf16": 2.0**-8, "f16": 2.0**-11}[spec.route.logits]
    slack = unit * (exact.abs().max() if tokens else 0.0)
    want_weights, want = route_logits(routing, exact.to(TORCH[spec.route.logits]), correction)
    same = (experts == want).all(-1)
    rtol = min(0.9, 4 * float(slack) + 1e-5)
    torch.testing.assert_close(weights[same], want_weights[same], rtol=rtol, atol=1e-6)
    if routing.groups == 1 and correction is None:
        score = exact.gather(-1, experts)
        assert (score - exact.gather(-1, want)).abs().le(2 * slack).all()
    assert same.float().mean() >= 0.8 or not tokens


@pytest.mark.parametrize("name", GATES)
def test_gate_matches_eager(name: str) -> None:
    torch.manual_seed(0)
    for tokens in (0, 1, 6, 71):
        check_gate(GATES[name], host(), tokens)


@pytest.mark.parametrize("target", ["generic", "avx2"])
def test_gate_on_narrower_targets(target: str) -> None:
    torch.manual_seed(0)
    check_gate(GATES["gpt-oss"], TARGETS[target], 35)
    check_gate(GATES["f16"], TARGETS[target], 3)


def test_gate_keeps_ties_and_nan_apart() -> None:
    """Equal logits: lower ids first; a NaN token does not touch its neighbours."""
    spec = GATES["qwen-f32"]
    x, weight = torch.ones(9, 37), torch.ones(60, 37)
    x[4] = torch.nan
    weights, experts = torch.zeros(9, 8), torch.zeros(9, 8, dtype=torch.int64)
    gate_kernel(spec, host())["gate"](*map(shared, [x, weight, weights, experts]))
    assert torch.equal(experts, torch.arange(8).expand(9, 8))
    assert weights[4].isnan().all()
    assert weights.isnan().sum() == 8
