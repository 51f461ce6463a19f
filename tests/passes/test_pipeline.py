"""Which passes run by default, and which only on request."""

from __future__ import annotations

import pytest

from moec.dynamo.options import exact, parse
from moec.passes.core.runner import OptInPass
from moec.pipeline import EXACT_OPT_IN, LEVELS, all_passes


def test_no_pass_of_a_phase_is_opt_in() -> None:
    """torch.compile and the descriptions tell them apart by the paper that an opt-in pass names."""
    assert [pass_.name for pass_ in all_passes() if isinstance(pass_, OptInPass)] == []
    assert all(isinstance(kind.source, str) for kind in EXACT_OPT_IN)


@pytest.mark.parametrize("level", LEVELS)
def test_torch_compile_runs_the_passes_of_every_level(level: int) -> None:
    assert exact(parse({"opt_level": level}, None))
