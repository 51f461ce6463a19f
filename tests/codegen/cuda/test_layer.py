"""One MoE layer of emulated kernels only, with its router's linear layer, against eager PyTorch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.activation import clamped_swiglu, gated, silu
from moec.codegen.cuda.gemm.grouped import grouped_linear
from moec.codegen.cuda.gemm.tiles import TileShape
from moec.codegen.cuda.routing.combine import combine
from moec.codegen.cuda.routing.dispatch import dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.specs.products import LinearSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.ir.ops.routing.routing import Routing, route_logits
from tests.codegen.cuda.gemm.test_gemv import packed
from tests.codegen.cuda.gemm.test_grouped import EAGER
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, emulated

EXPERTS, MODEL, HIDDEN = 8, 64, 32
SHAPE = TileShape(32, 32, 64, warp_rows=1, warp_columns=2, stages=3)
# The layers of Mixtral, DeepSeek-V3 (groups, a shared expert as addend) and GPT-OSS (biases).
LAYERS = {
    "softmax": (Routing(2, renormalize=True), "silu", False, False),
    "sigmoid-groups-shared": (
        Routing(
            3,
            score="sigmoid",
            renormalize=True,
            scale=2.5,
            groups=4,
            top_groups=2,
            group_score="top2sum",
        ),
        "silu",
        False,
        True,
    ),
    "gpt-oss": (Routing(2, score="none", after="softmax"), "clamped", True, False),
}


@cache
def kernels(name: str) -> dict[str, Emulated]:
    routing, join, biased, shared = LAYERS[name]
    k = routing.k
    epilogue = {"silu": gated(silu), "clamped": clamped_swiglu(1.7, 1.0)}[join]
    up = LinearSpec(HIDDEN, MODEL, "bfloat16", groups=EXPERTS, gated=True, bias=biased)
    down = LinearSpec(MODEL, HIDDEN, "bfloat16", groups=EXPERTS, bias=biased)
    bf16 = "bfloat16"
    back = CombineSpec(EXPERTS, k, MODEL, bf16, bf16, "float32", bf16 if shared else None)
    parts = {
        "logits": grouped_linear(
            LinearSpec(EXPERTS, MODEL, "bfloat16", "float32"), SM_80, shape=SHAPE, blocks=2
        ),
        "route": route(RouteSpec(routing, EXPERTS, "f32"), SM_80),
        "dispatch": dispatch(DispatchSpec(EXPERTS, k), SM_80),
        "up": grouped_linear(up, SM_80, epilogue=epilogue, top_k=k, shape=SHAPE, blocks=3),
        "down": grouped_linear(down, SM_80, shape=SHAPE, blocks=3),
        "combine": combine(back, SM_80),
    }
    return {part: emulated(kernel) for part, kernel in parts.items()}


def eager(name: str, x: Tensor, logits: Tensor, parts: dict[str, Tensor], addend: Tensor) -> Tensor:
    """In float64, with the routing of moec.ir.ops; rows are rounded where kernels store them."""
    routing, join, _, shared = LAYERS[name]
    weights, experts = route_logits(routing, logits, None)
    wide = {part: tensor.double() for part, tensor in parts.items()}
    out = addend.double() if shared else torch.zeros_like(x).double()
    for t, s in torch.cartesian_prod(torch.arange(len(x)), torch.arange(routing.k)).tolist():
        e = experts[t, s]
        row = x[t].double()
        gate = wide["gate"][e] @ row + wide["gate_bias"][e]
        up = wide["up"][e] @ row + wide["up_bias"][e]
        hidden = EAGER[join](gate, up).bfloat16().double()
        y = (wide["down"][e] @ hidden + wide["down_bias"][e]).bfloat16().double()
        out[t] += weights[t, s].double() * y
    return out


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, tokens: int) -> None:
    routing, _, biased, shared = LAYERS[name]
    run, k, schedule = kernels(name), routing.k, SCHEDULES[tokens % 4]
    shapes = {"gate": (HIDDEN, MODEL), "up": (HIDDEN, MODEL), "down": (MODEL, HIDDEN)}
    parts: dict[str, Tensor] = {}
    for part, (n, width) in shapes.items():
        parts[part] = (torch.randn(EXPERTS, n, width) * width**-0.5).bfloat16()
        parts[f"{part}_bias"] = (torch.randn(EXPERTS, n) * biased).bfloat16()
    x, addend = torch.randn(tokens, MODEL).bfloat16(), torch.randn(tokens, MODEL).bfloat16()
    router = torch.randn(1, EXPERTS, MODEL).bfloat16()

    logits = torch.full((tokens, EXPERTS), torch.nan)
    rows = torch.tensor([tokens], dtype=torch.int32)
    run["logits"](x, rows, router, logits, schedule=schedule)
    assert torch.allclose(logits, x.float() @ router[0].float().T, rtol=1e-5, atol=1e-4)
    weights, experts = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int64)
    run["route"](logits, weights, experts, schedule=schedule)
    order, slots = (torch.empty(s, dtype=torch.int32) for s in ((tokens * k,), (tokens, k)))
    ends = torch.empty(EXPERTS, dtype=torch.int32)
    run["dispatch"](experts, order, slots, ends, schedule=schedule)
    hidden = torch.empty(tokens * k, HIDDEN, dtype=torch.bfloat16)
    y = torch.empty(tokens * k, MODEL, dtype=torch.bfloat16)
    bias = [packed([parts["gate_bias"], parts["up_bias"]])] if biased else []
    w = packed([parts["gate"], parts["up"]])
    run["up"](x, order, ends, w, *bias, hidden, schedule=schedule)
    bias = [parts["down_bias"]] if biased else []
    run["down"](hidden, ends, parts["down"], *bias, y, schedule=schedule)
    out = torch.empty(tokens, MODEL, dtype=torch.bfloat16)
    run["combine"](y, slots, ends, weights, *([addend] if shared else []), out, schedule=schedule)

    exact = eager(name, x, logits, parts, addend)
    # Two roundings to bf16 that may fall on the other side, then one of the result.
    assert torch.allclose(out.double(), exact, rtol=2.0**-8, atol=2.0**-6)
