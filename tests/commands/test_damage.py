"""The effect of an approximate pass, as text and as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moec.passes.core.damage import Damage, Distance, LayerDamage
from moec.pipeline import without_effect
from moec.report.report import Report
from moec.report.text import render

NONE = Distance(0.0, 0.0, 0.0, 17.03)
SOME = Distance(0.2, 0.4, 0.0131, 17.6)
DAMAGE = Damage(
    name="prune-experts(keep=0.75,by=reap,seed=0)",
    tokens=4096,
    budget="kl<=0.02",
    bytes_before=7_000_000,
    bytes_after=6_600_000,
    flops_before=2.24e6,
    flops_after=2.239e6,
    original=NONE,
    after=SOME,
    layers=(
        LayerDamage("layers.0.mlp", "keeps 1, 2, 3 of 4", False, 400_000, 512, 0.37, 0.47, SOME),
        LayerDamage(
            "layers.1.mlp", "undone: kl is 0.05, the budget is kl<=0.02", True, 0, 0.0, 0.5, 0.6,
            Distance(0.3, 0.5, 0.05, 18.5),
        ),
    ),
)  # fmt: skip
REPORT = Report("tiny", damage=(DAMAGE,))


@pytest.mark.parametrize("width", [100, 72])
def test_text(golden: Callable[[str], None], width: int) -> None:
    text = render(REPORT, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "18.50\n" in text
    golden(text)


def test_no_language_model_has_no_perplexity() -> None:
    plain = replace(DAMAGE, layers=(), budget="", original=Distance(0, 0), after=Distance(0.1, 0.5))
    text = render(replace(REPORT, damage=(plain,)))
    assert "error 1.00e-01, 50.0% of tokens choose other experts\n" in text
    assert "perplexity" not in text
    assert "budget" not in text


def test_data_survives_json() -> None:
    assert Report.of_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT
    assert Report.of_dict({"model": "older"}).damage == ()


def test_what_was_asked_for_in_vain_is_said() -> None:
    def step(name: str, rewrites: int, reasons: tuple[str, ...] = (), damage: object = None) -> Any:
        declined = tuple(SimpleNamespace(reason=reason) for reason in reasons)
        return SimpleNamespace(name=name, rewrites=rewrites, declined=declined, damage=damage)

    undone = replace(DAMAGE, layers=DAMAGE.layers[1:])
    steps = [
        step("hoist-routers", 0, ("it reads hidden states", "it reads hidden states")),
        step("fold-lora", 0),
        step("fuse-gate", 0, ("nobody asked",)),
        step("specialise", 3),
        step("prune-experts", 1, damage=DAMAGE),
        step("merge-experts", 1, damage=undone),
    ]
    assert without_effect(steps) == (
        "hoist-routers changed nothing: it reads hidden states",
        "fold-lora changed nothing: it applies to nothing in the model",
        "merge-experts changed nothing: in every layer it exceeded the budget and was undone",
    )
