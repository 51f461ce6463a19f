"""This machine as a cluster of the planner: every number is measured, and survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.plan.network.cluster import read_cluster
from tests.commands.test_plan import MODEL, run


def test_the_machine_as_a_cluster(tmp_path: Path) -> None:
    path, model = tmp_path / "machine.yaml", tmp_path / "model.yaml"
    model.write_text(MODEL)
    result = run("plan", str(model), "--measure", str(path))
    assert result.exit_code == 0, result.output
    cluster = read_cluster(str(path))
    assert cluster.devices == 2
    numbers = cluster.quantities()
    assert {quantity.source for _, quantity in numbers} == {"measured"}
    assert all(quantity.value > 0 for _, quantity in numbers)
    assert "small on this machine, 2 ranks at once, 1 thread each: 2 devices" in result.stdout
    assert f"wrote {path}" in result.stdout


@pytest.mark.parametrize(
    "options", [[], ["--cluster", "h100-8", "--measure", "machine.yaml"]], ids=["none", "both"]
)
def test_one_cluster_is_said(options: list[str]) -> None:
    result = run("plan", "mixtral-8x7b", *options)
    assert result.exit_code == 2
    assert (
        "give either --cluster NAME|FILE, or --measure FILE.yaml for this machine" in result.stderr
    )
