"""`moec.compile_ranks` in Python: what it writes, returns and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UsageError, VerificationError
from moec.parallel.store import load_rank
from moec.plan.plan import LayerPlan, Plan, write_plan
from moec.runtime.package import DECODE, MAIN
from tests.models.families import FAMILIES
from tests.passes.parallel.test_plan_parallelism import plan

FAMILY = FAMILIES["olmoe"].one_layer()


def planned(experts: int, attention: int = 1) -> Plan:
    """Half of the experts on each of two ranks."""
    half = experts // 2
    layer = LayerPlan(
        layer=0, experts=experts, attention=attention, ranks=2,
        slots=(tuple(range(half)), tuple(range(half, experts))), seconds={},
    )  # fmt: skip
    return Plan(
        model="test", cluster="test", devices=2, node_size=2, workload=plan(2).workload,
        routing="", layers=(layer,), seconds=0.0, memory=0.0, memory_limit=0.0,
    )  # fmt: skip


def experts() -> int:
    return int(FAMILY.build().config.num_experts)


def test_a_module_and_a_plan(tmp_path: Path) -> None:
    """Both functions of both ranks are written; the norm of OLMoE's queries mixes heads."""
    arguments = FAMILY.build(), planned(experts(), attention=2), tmp_path / "out.ranks"
    ranks = moec.compile_ranks(*arguments, (), FAMILY.inputs(2, 5))
    assert ranks.folder == tmp_path / "out.ranks"
    (declined,) = ranks.declined
    assert declined.where == "model.layers.0.self_attn"
    assert declined.reason.endswith("q_norm mixes heads")
    for rank in (0, 1):
        assert load_rank(ranks.folder, rank, MAIN).plan == arguments[1]
        assert load_rank(ranks.folder, rank, DECODE).code.generation is not None
    with pytest.raises(UsageError, match=r"out\.ranks exists; --force \(overwrite=True"):
        moec.compile_ranks(*arguments, (), FAMILY.inputs(2, 5))


def test_results_beyond_the_tolerance(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"rank \d computes another logits: .* 1e-30"):
        moec.compile_ranks(
            FAMILY.build(), planned(experts()), tmp_path / "out.ranks", (), FAMILY.inputs(2, 5),
            verify=1e-30,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    """Before the model is captured."""
    file = tmp_path / "plan.json"
    write_plan(planned(8), file)
    model, output = torch.nn.Identity(), tmp_path / "out.ranks"
    with pytest.raises(UsageError, match="quant cannot be combined with a plan: leave it out"):
        moec.compile_ranks(model, file, output, quant="int8")
    with pytest.raises(UsageError, match="verify is 'no'"):
        moec.compile_ranks(model, file, output, verify="no")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"none\.json cannot be read: there is no such file"):
        moec.compile_ranks(model, tmp_path / "none.json", output)
    with pytest.raises(UsageError, match="is not a folder of ranks, and only such folders"):
        moec.compile_ranks(model, file, tmp_path, overwrite=True)
