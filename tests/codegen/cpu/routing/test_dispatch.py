"""The counting sort of choices: stable, complete, and safe with any id."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.cpu.routing.dispatch import dispatch
from moec.target.cpu import TARGETS


@cache
def kernel(build, num_experts: int, top_k: int):
    return build(TARGETS["generic"], dispatch(num_experts, top_k))


def sort(build, experts: torch.Tensor, num_experts: int):
    order = torch.full((experts.numel(),), -7, dtype=torch.int32)
    slots = torch.full(experts.shape, -7, dtype=torch.int32)
    ends = torch.full((num_experts,), -7, dtype=torch.int32)
    kernel(build, num_experts, experts.shape[1])(experts, order, slots, ends)
    return order.long(), slots.long(), ends.long()


def check(build, experts: torch.Tensor, num_experts: int) -> None:
    order, slots, ends = sort(build, experts, num_experts)
    owners = experts.flatten()
    owners = torch.where((owners < 0) | (owners >= num_experts), num_experts, owners)
    assert torch.equal(order, torch.argsort(owners, stable=True))
    assert torch.equal(order[slots.flatten()], torch.arange(len(owners)))
    counts = torch.bincount(owners, minlength=num_experts + 1)[:num_experts]
    assert torch.equal(ends, counts.cumsum(0))


@settings(max_examples=60)
@given(data=st.data(), num_experts=st.sampled_from([1, 2, 5, 300]), tokens=st.integers(0, 20))
def test_any_routing(build, data, num_experts, tokens):
    """Empty experts, all tokens on one, ids of no expert and ids out of range."""
    top_k = data.draw(st.integers(1, min(num_experts, 3)))
    ids = st.integers(-1, num_experts + 1) | st.sampled_from([-(2**63), 2**63 - 1, 2**32])
    flat = data.draw(st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k))
    check(build, torch.tensor(flat, dtype=torch.int64).reshape(tokens, top_k), num_experts)


def test_every_expert_for_every_token(build):
    check(build, torch.arange(5).repeat(7, 1).flip(1).contiguous(), 5)


def test_many_rows(build):
    check(build, torch.randint(0, 300, (2000, 3)), 300)
