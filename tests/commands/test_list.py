"""moec list: passes, targets, models and formats of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moec import __main__ as front
from moec.commands.list import FAMILIES, FORMS
from moec.passes import recognise
from moec.pipeline import OPT_IN
from moec.sources.checkpoint.table import FOLDERS, FORMATS
from moec.target import cpu as target
from moec.target import cuda
from tests.fresh import Warm, moec_command
from tests.models import families
from tests.models.test_other_families import COMPILED, TRIED


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(
        front.cli, ["list", *arguments], prog_name="moec"
    )


def test_targets() -> None:
    rows = json.loads(run("targets", "--json").stdout)
    names = ["cpu", *target.TARGETS, "llvm:-mcpu=...", *cuda.TARGETS]
    assert [row["target"] for row in rows] == names
    assert rows[0]["here"] == f"{target.host().name}, this machine's"
    assert all(name in run("targets").stdout for name in target.TARGETS)


def test_names_stay_whole_on_a_machine_that_lacks_much(monkeypatch: pytest.MonkeyPatch) -> None:
    features = target.TARGETS["amx"].features
    monkeypatch.setattr(target, "missing", lambda expected: features)
    assert all(name in run("targets").stdout for name in target.TARGETS)


def test_models() -> None:
    shown = run("models").stdout
    assert all(name in shown for name in (*FORMS, *(name for name, _, _ in FAMILIES)))


def test_formats_are_those_that_dispatch() -> None:
    rows = json.loads(run("formats", "--json").stdout)
    assert [row["format"] for row in rows] == [format.name for format in FORMATS]
    methods = {f"quant_method {method}" for format in FOLDERS for method in format.methods}
    assert methods <= {each for row in rows for each in row["recognised_by"].split(" or ")}
    assert all(row["format"] in run("formats").stdout for row in rows)


def test_forms_are_called_what_reports_call_them() -> None:
    folder = Path(recognise.__file__).parent
    source = "\n".join(file.read_text() for file in folder.rglob("*.py"))
    for form in FORMS:
        assert f'"{form}"' in source


def test_families_are_tested() -> None:
    tested = {*families.FAMILIES, *TRIED, *COMPILED}
    names = {name for name, _, _ in FAMILIES}
    assert {n if n in tested else n.removesuffix("_text") for n in names} <= tested


@pytest.mark.parametrize(("name", "architecture", "what"), FAMILIES)
def test_families_exist(name: str, architecture: str, what: str) -> None:
    model = getattr(pytest.importorskip("transformers"), architecture)
    assert model.config_class.model_type in (name, "llama4", "gpt_oss", "gemma4")


def test_passes_in_their_order() -> None:
    rows = json.loads(run("passes", "--json").stdout)
    names = [row["pass"] for row in rows]
    assert len(names) == len(set(names))
    assert names.index("canonicalise") < names.index("recognise-experts")
    assert names.index("recognise-experts") < names.index("expand-experts")
    for row in rows:
        assert row["what_it_does"], row
        if row["kind"] == "approximate" or "source" in row:
            assert row["from"] in ("opt-in", "--quant")
        else:
            assert row["from"] in ("-O0", "-O1", "-O2")
    assert "limit=" in rows[names.index("fold-constants")]["options"]
    assert "fold-constants" in run("passes").stdout


def test_passes_that_are_asked_for_tell_their_options_and_their_source() -> None:
    rows = {row["pass"]: row for row in json.loads(run("passes", "--json").stdout)}
    assert [p.name for p in OPT_IN] == [n for n, r in rows.items() if "source" in r]
    assert "moec.transform(model, passes, calib=...) returns a module" in run("passes").stdout
    for kind in OPT_IN:
        shown = run("passes", kind.name).stdout
        row = rows[kind.name]
        assert row["what_it_does"]
        assert "arXiv" in row["source"]
        for line in (*row["fields"], row["source"]):
            assert line in shown


def test_all_passes_fit_two_screens() -> None:
    lines = run("passes").stdout.splitlines()
    assert len(lines) <= 2 * 26
    assert max(map(len, lines)) <= 80


def test_what_is_piped_is_not_wrapped(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = warm.run(moec_command("list", "passes"), tmp_path).stdout
    assert shown
    rows = json.loads(run("passes", "--json").stdout)
    for row, line in zip(rows, shown.splitlines()[1:], strict=False):
        assert line.startswith(row["pass"])
        assert line.rstrip().endswith(row["what_it_does"])


def test_a_name_that_is_none() -> None:
    assert run("passes", "fuse-gat").stderr == (
        "error: there is no pass 'fuse-gat'; did you mean 'fuse-gate'?\n"
    )
    assert "list targets takes no name: leave out avx2" in run("targets", "avx2").stderr
