"""Router and combine over drawn routings, under all schedules, against eager; and inserted bugs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.cuda.routing.dispatch import combine
from moec.codegen.cuda.routing.route import route
from moec.codegen.specs.routing import CombineSpec, RouteSpec
from moec.ir.ops.routing.routing import Routing, route_logits
from tests.codegen.cuda.routing.test_routing import ROUTINGS, check_route
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated
from tests.cuda_emulator.products import TORCH, UNIT
from tests.cuda_emulator.routings import Routed, routed

EXPERTS = 3
PLAIN = CombineSpec(EXPERTS, 2, 37, "bfloat16", "bfloat16")
FULL = CombineSpec(EXPERTS, EXPERTS, 40, "float32", "float32", "float32", "float32")


@settings(max_examples=8)
@given(
    palette=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0]), min_size=1, max_size=3),
    tokens=st.integers(0, 4),
    seed=st.integers(0, 99),
    schedule=st.sampled_from(SCHEDULES),
)
@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "phimoe"])
def test_equal_logits(
    name: str, palette: list[float], tokens: int, seed: int, schedule: Schedule
) -> None:
    """Experts of few different logits: most choices are between equals, for each score, order and
    group; all tokens may choose the same experts."""
    spec, generator = ROUTINGS[name], torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(palette), (tokens, spec.num_experts), generator=generator)
    torch.manual_seed(seed)  # of the correction
    check_route(spec, torch.tensor(palette)[drawn], schedule)


@cache
def kernel(spec: CombineSpec, bug: Bug | None = None) -> Emulated:
    return emulated(combine(spec, SM_80), change=bug.plant if bug else str)


def is_right(run: Emulated, spec: CombineSpec, case: Routed) -> bool:
    """Rows of no expert hold NaN, and their weights infinities: neither may be read. A row of NaN
    makes its token NaN, and no other."""
    k, dtype = spec.top_k, TORCH[spec.rows]
    tokens = len(case.experts) // k
    experts = torch.tensor(case.experts[: tokens * k], dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(experts))
    owners = torch.where(experts < 0, spec.num_experts, experts)
    order = owners.sort(stable=True).indices
    slots = torch.empty_like(order)
    slots[order] = torch.arange(tokens * k)
    ends = owners.bincount(minlength=spec.num_experts + 1)[: spec.num_experts].cumsum(0).int()
    owned = (experts >= 0).reshape(tokens, k)
    y = torch.randn(tokens * k, spec.width, generator=generator).to(dtype)
    y[int(ends[-1]) :] = torch.nan
    if case.nan is not None and case.nan < tokens * k:
        y[case.nan] = torch.nan
    weights = torch.rand(tokens, k, generator=generator).masked_fill(~owned, torch.inf)
    addend = torch.randn(tokens, spec.width, generator=generator)
    out = torch.zeros(tokens, spec.width, dtype=TORCH[spec.out])
    more = [t for t, kind in ((weights, spec.weights), (addend, spec.addend)) if kind]
    slots = slots.int().reshape(tokens, k)
    run(y, slots, ends, *more, out, schedule=case.schedule)
    scale = weights.double() if spec.weights else torch.ones(tokens, k, dtype=torch.float64)
    parts = y.double()[slots.long()] * scale.unsqueeze(-1)
    exact = torch.where(owned.unsqueeze(-1), parts, 0.0).sum(1)
    exact = exact + addend.double() if spec.addend else exact
    allowed = UNIT[out.dtype] * exact.abs() + 2.0**-20
    near = ((out.double() - exact).abs() <= allowed) | exact.isnan()
    return torch.equal(out.isnan(), exact.isnan()) and bool(near.all())


@settings(max_examples=20)
@given(case=routed(EXPERTS, 12))
@pytest.mark.parametrize("spec", [PLAIN, FULL], ids=["plain", "full"])
def test_rows_come_back(spec: CombineSpec, case: Routed) -> None:
    assert is_right(kernel(spec), spec, case)


COMBINE_BUGS = (
    Bug("rows of no expert are read", r"if \(v_\d+ < _ptr_\d+\[2\]\)", "if (true)"),
    Bug("a choice is left out", r"fmaf\(([^;]*), (_ptr_\d+\[0\])\);", r"\2;", last=True),
    Bug("rows are not weighted", r"fmaf\(_ptr_\d+\[[^;]*?\], _ptr", "fmaf(1.0f, _ptr"),
)


@pytest.mark.parametrize("bug", COMBINE_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs_of_combine(bug: Bug) -> None:
    run = kernel(FULL, bug)

    def right(schedule: Schedule) -> bool:
        return is_right(run, FULL, Routed([0, 1, 2, 2, -1, 0], None, schedule))

    check_found(bug, right)


ROUTE_BUGS = (
    Bug(
        "of equals the last is chosen",
        r"__reduce_min_sync\(([^,]*), (v_\d+)\)",
        r"__reduce_max_sync(\1, \2 == 2147483647 ? -1 : \2)",
    ),
    Bug("a choice is made twice", r"(_ptr_\d+\[0\]) = -2147483647;", ";"),
    Bug("weights are not divided by their sum", r"(_ptr_\d+\[0\]) = \(\1 / .*;", ";", last=True),
)


@pytest.mark.parametrize("bug", ROUTE_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs_of_the_router(bug: Bug) -> None:
    spec = RouteSpec(Routing(2, renormalize=True), 8, "f32")
    run = emulated(route(spec, SM_80), change=bug.plant)
    logits = torch.tensor([[1.0, 0, 2, 2, 0, 0, 1, 2]])
    expected = route_logits(spec.routing, logits, None)

    def right(schedule: Schedule) -> bool:
        weights, experts = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int64)
        run(logits, weights, experts, schedule=schedule)
        return torch.equal(experts, expected[1]) and torch.allclose(weights, expected[0])

    check_found(bug, right)
