"""The report as text and as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moec.ir.text import parse
from moec.passes.core.damage import Damage, Distance
from moec.report.data import LoopLine, MovedLine, QuantisedLine
from moec.report.report import Report, describe_graph
from moec.report.text import render
from moec.report.units import collapse_layer_indices, count, seconds, size, spans
from tests.commands import models


def test_text(golden: Callable[[str], None]) -> None:
    golden(render(models.report(), width=110))


def test_brief(golden: Callable[[str], None]) -> None:
    golden(models.report().brief)


def test_brief_without_blocks_and_verification() -> None:
    text = Report("plain", parameters=10).brief
    assert text == (
        "plain\n"
        "blocks      no MoE block was recognised: the model is compiled without MoE kernels\n"
        "verified    no: the code was not compared with eager\n"
        "size        10 parameters\n"
    )


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"B": (0, None), "S": (1, 4096)}, ""),
        ({"B": (1, None), "Mod(S, 4)": (0, 0)}, ""),
        ({"S": (0, 6)}, "S is from 0 to 6"),
        ({"B": (4, 4), "S": (2, None)}, "B is 4 and S is at least 2"),
    ],
)
def test_a_brief_report_begins_with_sizes_that_users_expect_and_calls_refuse(
    sizes: dict[str, tuple[int, int | None]], line: str
) -> None:
    lines = replace(models.report(), sizes=sizes).brief.splitlines()
    expected = f"sizes       calls are refused unless {line}"
    assert lines[1] == expected if line else "sizes " not in "\n".join(lines)


def test_brief_names_what_approximations_changed() -> None:
    distances = Distance(0.0, 0.0, 0.0, 9.5), Distance(0.02, 0.01, 0.003, 9.6)
    damage = Damage("prune", 512, "", 8_000_000, 6_000_000, 10, 8, *distances)
    quantised = QuantisedLine("layers.0.moe", "int4:32", 4, 3, 100, 25, 0.05, 0.07)
    moved = MovedLine("logits", 0.1, 3, 64)
    loop = LoopLine("layers.0", "aten.cumsum", "an axis is not the last")
    text = replace(
        models.report(), damage=(damage,), quantised=(quantised,), moved=(moved,), loops=(loop,)
    ).brief
    for line in (
        "loops       1 op without a kernel: plain loops",
        "changed     prune: 8.0 MB to 6.0 MB of weights, error 2.00e-02, 1.0% of tokens choose "
        "other experts, KL 0.0030 nats per token, perplexity 9.50 becomes 9.60",
        "quantised   int4:32: 3 of 4 parts, error of weights at most 7.0e-02",
        "            3 of 64 rows of logits have another argmax than unquantised",
        "verified    against the quantised graph: error of hidden 2.0e-03, 1e-04 allowed: each "
        "kernel is right, see the note",
    ):
        assert line in text.splitlines()


def test_names_in_a_brief_report_are_printable() -> None:
    assert "\x1b" not in replace(models.report(), model="a\x1b[31m").brief


def test_narrow_text_folds_and_loses_nothing(golden: Callable[[str], None]) -> None:
    text = render(models.report(), width=72)
    assert max(map(len, text.splitlines())) <= 72
    golden(text)


def test_without_moe() -> None:
    text = render(Report("plain", parameters=10), width=80)
    assert "No MoE block was recognised: the model is compiled without MoE kernels." in text
    assert "active" not in text


def test_a_report_prints_itself() -> None:
    report = models.report(1)
    assert str(report) == repr(report) == render(report)


def test_color_only_where_asked() -> None:
    assert "\x1b" not in render(models.report(), width=80)
    assert "\x1b" in render(models.report(), width=80, color=True)


def test_data_survives_json() -> None:
    report = models.report()
    assert Report.of_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_reports_of_other_versions_can_be_read() -> None:
    recorded = models.report().to_dict() | {"invented_later": 1}
    del recorded["notes"]
    assert Report.of_dict(recorded) == replace(models.report(), notes=())


def test_tied_weights_count_once() -> None:
    graph = parse(
        "graph g(; a: f32[2, 3], b: f32[2, 3], c: bf16[4]) {\n"
        "  y: f32[2, 3] = aten.add.Tensor(a, b)\n  return y\n}"
    )
    tied = torch.zeros(2, 3)
    facts = describe_graph(graph, {"a": tied, "b": tied, "c": torch.zeros(4, dtype=torch.bfloat16)})
    assert facts["parameters"] == 10
    assert facts["bytes_by_dtype"] == {"f32": 24, "bf16": 8}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.mlp"], "a.mlp"),
        (["l.0.mlp", "l.1.mlp", "l.2.mlp"], "l.{0..2}.mlp"),
        (["l.0.mlp", "l.2.mlp", "l.3.mlp"], "l.{0,2..3}.mlp"),
        (["l.0.a", "l.1.b"], "l.0.a and 1 more"),
        (["l.0.e.0", "l.1.e.1", "l.2.e.0"], "l.0.e.0 and 2 more"),
        (["conv1d.x", "conv2d.x"], "conv1d.x and 1 more"),
    ],
)
def test_names_that_differ_in_a_number_are_one(names: list[str], shown: str) -> None:
    assert collapse_layer_indices(names) == shown


def test_numbers_for_people() -> None:
    assert [count(n) for n in (0, 999, 1234, 999_400, 46_702_792_704)] == [
        "0", "999", "1.23 K", "999 K", "46.7 B"
    ]  # fmt: skip
    assert [size(n) for n in (12, 1500, 2.5e9)] == ["12 bytes", "1.5 kB", "2.5 GB"]
    assert [seconds(s) for s in (0.004, 9.99, 61.2)] == ["0.00 s", "9.99 s", "61 s"]
    assert spans([3, 1, 2, 7]) == "1..3,7"
