"""The layers that are measured, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from benchmarks.cuda.shapes import LayerShape

Run = Callable[[Any], Any]  # x[1, T, D] -> [1, T, D]


def block(layer: LayerShape) -> Any:
    """OLMoE's block in this shape: softmax, top-k, SwiGLU; random weights in bf16."""
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=layer.width,
        intermediate_size=layer.hidden,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )
    torch.manual_seed(0)
    module = OlmoeSparseMoeBlock(config).to(torch.bfloat16).requires_grad_(False).eval()
    for weight in module.parameters():
        weight.normal_(std=0.03)
    return module


def with_experts(module: Any, implementation: str) -> Any:
    """The module with the same weights, and its experts by one of transformers' implementations."""
    import copy

    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    experts = copy.copy(module.experts)
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation = implementation
    twin._modules["experts"] = experts
    return twin


@cache
def subject(layer: LayerShape, device: str, target: str) -> tuple[Any, Run]:
    """The block, and moec's code for any number of tokens, compiled once for all steps."""
    import torch

    import moec

    module = block(layer)
    x = torch.randn(1, 7, layer.width, dtype=torch.bfloat16)
    run = moec.compile(module, (x,), target=target, verify=False)
    return module.to(device), run


def equal_products(layer: LayerShape, tokens: int, device: str) -> Run:
    """cuBLAS with the same FLOPs: the rows are split evenly over all active experts."""
    import torch

    active = round(layer.active(tokens))
    rows = max(1, tokens * layer.top_k // active)
    up = torch.randn(active, layer.width, 2 * layer.hidden, dtype=torch.bfloat16, device=device)
    down = torch.randn(active, layer.hidden, layer.width, dtype=torch.bfloat16, device=device)
    x = torch.randn(active, rows, layer.width, dtype=torch.bfloat16, device=device)

    def run(_: Any) -> Any:
        gate, value = torch.bmm(x, up).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate) * value, down)

    return run


def vllm_products(module: Any, x: Any) -> Run:
    """The products of experts by vLLM's Triton kernels; the route is computed before. Raises
    ImportError where there is no vLLM."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    _, weights, experts = module.gate(x.reshape(-1, x.shape[-1]))
    up, down = module.experts.gate_up_proj, module.experts.down_proj
    weights, experts = weights.float(), experts.int()

    def run(x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        return fused_experts(
            hidden_states=rows, w1=up, w2=down, topk_weights=weights, topk_ids=experts
        ).reshape(x.shape)

    return run


def triton_products(module: Any, x: Any) -> dict[str, Run]:
    """The products of experts by Triton, by the tile that they use; routes, and the sort of rows
    that a tile needs, are computed before. Raises ImportError where there is no Triton."""
    from benchmarks.cuda import grouped_triton

    rows = x.reshape(-1, x.shape[-1])
    _, weights, experts = module.gate(rows)
    up, down = module.experts.gate_up_proj, module.experts.down_proj

    def run(tile: Any, blocks: Any, x: Any) -> Any:
        y = grouped_triton.layer(x.reshape(rows.shape), up, down, weights, blocks, tile)
        return y.reshape(x.shape)

    return {
        str(tile): partial(run, tile, grouped_triton.blocks_of(experts, up.shape[0], tile.rows))
        for tile in grouped_triton.TILES
    }
