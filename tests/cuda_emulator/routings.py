"""Routings for tests of products: the expert of each row, -1 where it has none."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.cuda_emulator.emulate import SCHEDULES, Schedule


@dataclass(frozen=True)
class Routed:
    """`experts` has the expert of each row; the row `nan` (if there is one) holds NaN."""

    experts: list[int]
    nan: int | None
    schedule: Schedule


@st.composite
def routed(draw: st.DrawFn, num_experts: int, longest: int) -> Routed:
    """No rows, one row, all on one expert, experts without rows, each expert once for each token
    (k = E), rows without an expert; up to `longest` rows, under any schedule."""
    each = list(range(num_experts))
    experts = draw(
        st.one_of(
            st.lists(st.integers(-1, num_experts - 1), max_size=longest),
            st.builds(lambda e, rows: [e] * rows, st.sampled_from(each), st.integers(1, longest)),
            st.builds(lambda tokens: each * tokens, st.integers(1, longest // num_experts)),
        )
    )
    rows = st.none() if not experts else st.none() | st.integers(0, len(experts) - 1)
    return Routed(experts, draw(rows), draw(st.sampled_from(SCHEDULES)))
