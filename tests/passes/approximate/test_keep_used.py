"""keep-used: the experts of one task, from a table or from data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.errors import UsageError
from moec.ir.text import print_graph
from moec.passes.approximate.keep_used import KeepUsed
from tests.passes.changed import LAYER, change, declined, outputs, program, tokens


def table(folder: Path, usage: Any) -> str:
    path = folder / "usage.json"
    path.write_text(json.dumps(usage))
    return str(path)


def test_text(golden: Any, tmp_path: Path) -> None:
    usage = table(tmp_path, {"layers.0": [0.5, 0.01, 0.47, 0.02]})
    golden(print_graph(change(program(1), KeepUsed(usage=usage))[-1].program.graph))


def test_never_chosen_experts_cost_nothing() -> None:
    """A channel that is the same for all tokens keeps two experts from being chosen."""
    original = program()
    original.weights["embed"][:, 0] = 5.0
    for i in range(2):
        router = original.weights[f"layers.{i}.router"]
        router[:] = torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) / 100
        router[:, 0] = torch.tensor([-3.0, 3.0, 2.0, -4.0])
        original.weights[f"layers.{i}.w2"][:, 0] = 0
    step = change(original, KeepUsed(), limit="changed<=0,kl<=1e-6")[-1]
    assert step.damage is not None
    assert [line.says for line in step.damage.layers] == ["keeps 1, 2 of 4"] * 2
    for seed in range(5):  # sums of 20 products in another order
        ids = tokens(64, seed)
        result, right = outputs(step.program, ids), outputs(original, ids)
        torch.testing.assert_close(result, right, rtol=1e-6, atol=1e-6)


def test_no_fewer_than_k(tmp_path: Path) -> None:
    usage = table(tmp_path, {"layers.0": [0.0, 0.0, 1.0, 0.0]})
    step = change(program(1), KeepUsed(threshold=2.0, usage=usage))[-1]
    assert step.damage is not None
    assert step.damage.layers[0].says == "keeps 0, 2 of 4"


@pytest.mark.parametrize(
    ("layer", "threshold", "says"),
    [
        (LAYER, 0.0, "each of 4 experts is used enough to be kept"),
        (
            LAYER.replace("renormalize=true", "groups=2, top_groups=2"),
            0.9,
            "among groups of experts, which must keep equal sizes",
        ),
    ],
)
def test_declines(layer: str, threshold: float, says: str) -> None:
    assert says in declined(program(1, layer), KeepUsed(threshold=threshold))


@pytest.mark.parametrize(
    ("usage", "says"),
    [
        ({"layers.7": [1, 1, 1, 1]}, "has no layer layers.0; it has layers.7"),
        ({"layers.0": [1, 1]}, "layers.0 has 4 experts: give as many shares, none below 0"),
        ({"layers.0": [1, 1, 1, -1]}, "none below 0"),
        ({"layers.0": "much"}, "is not a table of usage: write"),
        ([1, 2], "is not a table of usage: write"),
    ],
)
def test_tables_are_refused(tmp_path: Path, usage: Any, says: str) -> None:
    with pytest.raises(UsageError, match=r"keep-used: .*usage\.json") as raised:
        change(program(1), KeepUsed(usage=table(tmp_path, usage)))
    assert says in str(raised.value)


def test_a_table_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"keep-used: none\.json cannot be read"):
        change(program(1), KeepUsed(usage="none.json"))
