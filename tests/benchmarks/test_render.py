"""Records of measurements, and the page that is written from them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.claims import CLAIMS, Claim
from benchmarks.models import bench as models
from benchmarks.records import (
    Record,
    append_record,
    measured_now,
    newest,
    parse_record,
    read_records,
)
from benchmarks.render import PAGES, WRITTEN, cells, readme_table, render, section, table
from moec.inspect.bench.race import Figure, Load
from moec.inspect.bench.result import BenchResult, ContenderLine, MeasuredLimits

ROOT = Path(__file__).resolve().parents[2]


def record(machine: str, date: str, case: str = "", milliseconds: float = 1.0) -> Record:
    return Record("layer", machine, ({"ms": milliseconds},), case, date)


def test_the_pages_are_up_to_date():
    pages = {path.name: path.read_text(encoding="utf-8") for path in PAGES.iterdir()}
    written = {name: text for name, text in pages.items() if WRITTEN in text}
    assert written == render(), "run make pages"


def test_pages_are_short():
    assert max(len(text.split()) for text in render().values()) < 4000


def test_the_readme_has_the_table_of_the_records():
    assert readme_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_records_say_what_was_measured_where():
    for entry in read_records():
        assert entry.claim in {claim.name for claim in CLAIMS}
        assert entry.command or entry.conditions, entry
        assert entry.commit or entry.recorded, entry


def test_a_record_that_was_appended_is_read_back(tmp_path):
    entry = record("a", "2026-11-26", "olmoe")
    append_record(entry, tmp_path / "layers.jsonl")
    append_record(entry, tmp_path / "layers.jsonl")
    assert list(read_records(tmp_path)) == [entry, entry]


def test_a_run_records_its_command_and_commit(monkeypatch):
    words = ["/somewhere/benchmarks/layers/layer.py", "--rounds", "5", "--record", "x.jsonl"]
    monkeypatch.setattr("sys.argv", [*words, "--machine", "AMD EPYC, Zen 4"])
    entry = measured_now("layer-bf16", "olmoe", "AMD EPYC, Zen 4", [{"tokens": 1}], "idle")
    assert entry.command == "python -m benchmarks.layers.layer --rounds 5"
    assert entry.machine == "AMD EPYC, Zen 4"
    assert len(entry.commit) >= 7


def test_a_race_of_models_becomes_a_record():
    figure = Figure(100.04, 90.0, 110.0)
    lines = (
        ContenderLine("moec", figure, figure, 1.0, 1.0),
        ContenderLine("eager", figure, figure, 2.341, 3.0),
    )
    limits = MeasuredLimits("bfloat16", 4.72e11, 4.87e10, 0.5, 0.01)
    race = BenchResult(
        "model", "bf16", "AMD EPYC", 2, {"moec": "0.1.0"}, Load(1, 512, 32, 10), limits, lines,
        0.85, 0.81, 1.2,
    )  # fmt: skip
    words = ["/home/model", "--artifact", "bf16.moec"]
    options = argparse.Namespace(case="bf16", machine="AMD EPYC, Zen 4", claim="model", words=words)
    entry = models.record_of(race.to_dict(), options)
    assert entry.case == "bf16 beside eager"
    assert entry.command == "moec bench model --artifact bf16.moec"
    assert entry.rows[1]["prefill tokens/s"] == 100.0
    assert entry.rows[1]["prefill ratio"] == 2.34
    assert "peak 472 GFLOP/s in bfloat16, bandwidth 48.7 GB/s" in entry.conditions
    assert "prefill at 85% of the measured limit" in entry.conditions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"claim": "a", "machine": "b"}', r"f:1: .*missing \['rows'\]"),
        ('{"claim": "a", "machine": "b", "rows": []}', "f:1: no rows"),
        ('{"claim": "a", "machine": "b", "rows": [{}], "x": 1}', r"unknown fields \['x'\]"),
    ],
)
def test_a_record_of_another_form_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_record(line, "f:1")


def test_an_unknown_claim_is_refused(tmp_path):
    append_record(record("a", "2026-11-26"), tmp_path / "layers.jsonl")
    with pytest.raises(ValueError, match=r"no such claims: \['layer'\]"):
        render(tmp_path)


def test_newest_of_each_machine_and_case():
    old, new = record("a", "2026-11-24"), record("a", "2026-11-25")
    again, other = record("a", "2026-11-25"), record("a", "2026-11-01", "int8")
    assert newest([new, old]) == [new]
    assert newest([old, new, again, other])[0] is again
    assert newest([old, other]) == [old, other]


def test_an_unrecorded_machine_gives_way_to_a_recorded_one():
    nameless, named = record("not recorded", "2026-11-26"), record("a", "2026-11-25")
    assert newest([nameless, named]) == [named]
    assert newest([nameless]) == [nameless]


def test_numbers_of_a_column_have_the_same_decimals():
    a, b = record("a", "", "x", 1.5), record("b", "", "y", 22.25)
    assert cells([a, b]) == [["machine", "case", "ms"], ["a", "x", "1.50"], ["b", "y", "22.25"]]
    assert table([["a", "b"], ["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_cases_with_columns_of_their_own_have_tables_of_their_own():
    records = [record("a", "", "x"), record("b", "", "y")]
    assert section(Claim("layer", "Layer", "", by_case=True), records).count("| ms |") == 2
