"""The data of the page, what it refuses, and the command."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moec
from moec.errors import ArtifactError, InputError, UsageError
from moec.inspect.exploration.explore import explored_model, page_data
from moec.inspect.exploration.page import page, script_json
from moec.ir.text import print_graph
from moec.plan.inputs.workload import Workload
from moec.plan.plan import LayerPlan, Plan
from moec.report.pass_graphs.stored import read_passes
from moec.report.pass_graphs.table import Hunk, hunks
from moec.runtime.call.routing_trace import of_ids, save_trace
from tests.command_line import invoke
from tests.inspect.exploration import modules
from tests.inspect.exploration.conftest import Files

ROOT = Path(__file__).parents[3]
DECLINED_LINE = next(
    f"modules.py:{number}: `{line.strip()}`"
    for number, line in enumerate(Path(modules.__file__).read_text().splitlines(), 1)
    if "rows.mean" in line
)


def applied(before: list[int], changes: list[Hunk]) -> list[int]:
    """As the page does it."""
    after: list[int] = []
    at = 0
    for position, count, numbers in changes:
        after += before[at:position] + numbers
        at = position + count
    return after + before[at:]


def shown(data: dict[str, Any], function: int = 0) -> list[list[str]]:
    """The ops of each step as the text of the IR, without modules and bodies."""
    texts: list[str] = data["texts"]
    steps, ids = [], list[int]()
    for step in data["functions"][function]["steps"]:
        ids = applied(ids, step["hunks"])
        lines = []
        for name, attrs, _, _, _, inputs, outputs in (data["ops"][n] for n in ids):
            pairs = zip(outputs[::2], outputs[1::2], strict=True)
            values = ", ".join(f"{texts[value]}: {texts[kind]}" for value, kind in pairs)
            arguments = ", ".join(texts[n] for n in inputs)
            options = f" <{texts[attrs]}>" if texts[attrs] else ""
            lines.append(f"{values} = {texts[name]}({arguments}){options}")
        steps.append(lines)
    return steps


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_hunks_lead_from_one_graph_to_the_next(before: list[int], after: list[int]) -> None:
    changes = hunks(before, after)
    assert applied(before, changes) == after
    assert not any(count == 0 == len(numbers) for _, count, numbers in changes)


def test_hunks_are_as_few_as_can_be() -> None:
    assert hunks([1, 2, 3, 4, 5], [1, 3, 9, 4, 5]) == [(1, 1, []), (3, 0, [9])]
    assert hunks([1, 2, 3, 4], [4, 1, 2, 3]) == [(0, 0, [4]), (3, 1, [])]


def test_graphs_of_the_page_are_those_of_the_passes(declined: moec.CompiledModel) -> None:
    data = page_data(explored_model(declined))
    for lines, result in zip(shown(data), declined.pass_results, strict=True):
        text = re.sub(
            r"( @ \S+)?( \{\n(    .*\n)+  \})?$", "", print_graph(result.program.graph), flags=re.M
        )
        assert [f"  {line}" for line in lines] == [
            line for line in text.splitlines() if " = " in line
        ]
    # No pass but the first has an op that another has.
    total = sum(len(lines) for lines in shown(data))
    assert len(data["ops"]) < total / 10


def test_an_artifact_with_its_passes(compiled_tiny_moe: moec.CompiledModel, tmp_path: Path) -> None:
    """What the page of the compiled model has: all graphs, lines with their code, and declined
    candidates; the graphs of other functions are added to them."""
    path = tmp_path / "passes.moec"
    compiled_tiny_moe.save(path, keep_passes=True)
    data, model = (page_data(explored_model(each)) for each in (path, compiled_tiny_moe))
    assert data["functions"][0] == model["functions"][0]
    assert data["declined"] == model["declined"]
    assert shown(data, 1)[-1] == shown(model, 1)[-1]
    assert data["calls"] == model["calls"]
    lines = {data["texts"][row[3]] for row in data["ops"]}
    assert any(re.fullmatch(r"modeling_qwen3_moe\.py:\d+: `.*`", line) for line in lines)
    assert moec.load(path).artifact.files == compiled_tiny_moe.source.files


STORED: dict[str, Any] = json.loads("""{
    "texts": ["a", ""], "ops": [[0, 1, 1, 1, 1, [0], [0, 0]], [1, 1, 1, 1, 1, [], []]],
    "steps": [
        {"name": "", "stage": "", "rewrites": 0, "seconds": 0, "ops": 2, "hunks": [[0, 0, [0, 1]]]},
        {"name": "one", "stage": "", "rewrites": 0, "seconds": 0, "ops": 1, "hunks": [[0, 1, []]]}],
    "declined": [{"where": "", "rule": "one", "reason": "why", "step": 0, "op": 1}]
}""")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("texts",), ["a"], "a number of no text"),
        (("texts",), ["a", "a"], "a text or an op twice"),
        (("ops", 1, 5), [-1], "a number of no text"),
        (("ops",), [], "a number of no op"),
        (("ops", 0), [0], "Expected `array` of length 7"),
        (("steps", 0, "hunks"), [[0, 0, [0, 2]]], "a number of no op"),
        (("steps", 1, "hunks"), [[0, 3, []]], "a number of no position"),
        (("steps", 1, "hunks"), [[1, 0, [0]], [0, 2, []]], "a number of no position"),
        (("steps", 1, "hunks"), [], "its graphs are not those of main"),
        (("steps", 1, "ops"), 2, "its graphs are not those of main"),
        (("steps",), [], "its graphs are not those of main"),
        (("declined", 0, "step"), 2, "a number of no step"),
        (("declined", 0, "op"), 2, "a number of no position"),
        (("more",), 1, "Object contains unknown field `more`"),
    ],
)
def test_malformed_passes(path: tuple[Any, ...], value: Any, reason: str) -> None:
    content = json.loads(json.dumps(STORED))
    read_passes(Path("x.moec"), json.dumps(content).encode(), 1)
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ArtifactError) as error:
        read_passes(Path("x.moec"), json.dumps(content).encode(), 1)
    assert str(error.value).startswith("x.moec: its graphs after passes are malformed: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("; compile the model again")


def test_names_cannot_end_the_script() -> None:
    text = script_json({"<!--</script>&\u2028": [float("nan"), 1.5, "\ud800"]})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"<!--</script>&\u2028": [None, 1.5, "\ud800"]}


def planned(experts: int, layers: int) -> Plan:
    """A plan of a layer for two devices, and a dense one."""
    layer = LayerPlan(
        layer=0, experts=experts, attention=1, ranks=2, slots=(tuple(range(experts)), ()),
        seconds={"experts": 2e-3, "exchange out": 1e-3}, hidden=5e-4,
    )  # fmt: skip
    dense = LayerPlan(layer=1, experts=0, attention=2, seconds={"attention": 1e-3})
    return Plan(
        model="tiny", cluster="two", devices=2, node_size=2, routing="uniform", seconds=1.0,
        workload=Workload(phase="decode", tokens=8, sequences=8, context=8, compute="bf16",
        send="bf16"), layers=(layer,) * layers + (dense,), memory=1.0, memory_limit=2.0,
    )  # fmt: skip


def test_a_plan(files: Files) -> None:
    model = explored_model(files.artifact)
    plan = page_data(model, plan=planned(8, 4))["plan"]
    assert [layer["total"] for layer in plan["layers"]] == pytest.approx([2.5e-3] * 4 + [1e-3])
    assert refused(files.artifact, plan=planned(8, 3)) == (
        "the plan is of another model (tiny): its MoE layers have [8, 8, 8] experts, and those of "
        "tiny.moec [8, 8, 8, 8]"
    )


def refused(model: Any, **options: Any) -> str:
    with pytest.raises((ArtifactError, InputError, UsageError)) as error:
        moec.explore(model, **options)
    return str(error.value)


def test_a_trace_of_another_model(files: Files, tmp_path: Path) -> None:
    save_trace(of_ids(np.zeros((3, 2, 2), np.int16), 64), tmp_path / "other.npz")
    assert refused(files.artifact, trace=tmp_path / "other.npz") == (
        f"{tmp_path}/other.npz was recorded of another model: it has 2 MoE layers of 64 experts, "
        "and tiny.moec has 4 MoE layers of 8 experts"
    )
    empty = of_ids(np.full((3, 4, 2), -1, np.int16), 8)
    assert refused(files.artifact, trace=empty) == (
        "the trace: no expert was chosen: it has no routing to show"
    )
    assert "is not a routing trace" in refused(files.artifact, trace=files.profile)


def test_a_long_trace_is_cut(files: Files) -> None:
    """2**20 ids are shown: 2**17 tokens of four layers and two choices."""
    trace = of_ids(np.ones((2**17 + 5, 4, 2), np.int16), 8)
    routing = page_data(explored_model(files.artifact), trace=trace)["routing"]
    assert (routing["tokens"], routing["of"]) == (2**17, 2**17 + 5)
    assert len(routing["ids"]) == 4 * -(-(2**20) * 2 // 3)


def test_a_profile_of_another_artifact(
    files: Files, declined: moec.CompiledModel, tmp_path: Path
) -> None:
    other = json.loads(files.profile.read_text())
    other["phases"][0]["kernels"].pop()
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    count = len(other["phases"][0]["kernels"])
    assert refused(files.artifact, profile=path) == (
        f"{path} is a profile of another artifact: its decode runs {count} kernels, and that of "
        f"tiny.moec has {count + 1}"
    )
    other["phases"][0]["kernels"].append({"kernel": "x", "time": other["phases"][0]["call"]})
    path.write_text(json.dumps(other))
    assert refused(files.artifact, profile=path) == (
        f"{path} is a profile of another artifact: kernel {count} of its decode is of no module, "
        "and that of tiny.moec of lm_head"
    )
    path.write_text("{}")
    assert refused(files.artifact, profile=path) == (
        f"{path} is not a profile: it is not what `moec profile --json` writes"
    )
    assert refused(files.artifact, profile=tmp_path / "none.json") == (
        f"{tmp_path}/none.json cannot be read: there is no such file or folder"
    )
    assert refused(declined, profile=files.profile) == (
        "a profile has times of an artifact's kernels, and Stack has none: it is a model; compile "
        "it and explore the artifact"
    )


def test_what_is_no_artifact(files: Files, tmp_path: Path) -> None:
    text = tmp_path / "text.moec"
    text.write_text("no archive")
    assert str(text) in refused(text)
    assert refused(3) == (
        "int cannot be explored: give what moec.compile returns, or the path of an artifact"
    )
    assert refused(files.artifact, plan=files.profile).startswith(
        f"{files.profile} is not a plan: "
    )


run = partial(invoke, "explore")


def test_the_command_writes_a_file(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    result = run(files.artifact, "--trace", files.trace, "-o", output)
    assert (result.exit_code, result.output) == (0, f"wrote {output}\n")
    assert output.read_text() == moec.explore(files.artifact, trace=files.trace)


def test_the_command_explores_a_model(declined: moec.CompiledModel, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    source = f"{modules.__file__}:stack"
    assert run(source, "-o", output, "-q").exit_code == 0
    text = output.read_text()
    assert DECLINED_LINE in text
    data = json.loads(re.findall(r'application/json">(.*?)</script>', text, re.S)[0])
    assert data["declined"] == page_data(explored_model(declined))["declined"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bf16"), "--dtype is of models, and {} is an artifact: leave it out"),
        (("-o", "x.txt"), "-o x.txt: the name must end in .html"),
        (
            ("-o", "x.html", "--port", "80"),
            "-o writes the page and --port serves it: leave one out",
        ),
    ],
)
def test_options_that_do_not_fit(files: Files, arguments: tuple[str, ...], message: str) -> None:
    result = run(files.artifact, *arguments)
    assert result.exit_code == 2
    assert message.format(files.artifact) in result.output


def test_a_port_in_use(files: Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = run(files.artifact, "--port", port)
    assert result.exit_code == 1
    assert f"--port {port} cannot be used: address already in use" in result.output.lower()


INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
from moec.__main__ import main
main()
"""


def test_it_is_served_until_interrupted(files: Files) -> None:
    command = [sys.executable, "-c", INTERRUPTIBLE, "explore", str(files.artifact)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            with urlopen(address) as response:
                assert response.read().decode() == moec.explore(files.artifact)
                assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_a_page_needs_only_its_data() -> None:
    """Any names, with the policy for the one style and the one script."""
    html = page({"title": "<b>&"})
    assert "<title>&lt;b&gt;&amp;</title>" in html
    assert len(re.findall(r"(?:style|script)-src 'sha256-[\w+/=]{44}'", html)) == 2
    assert "%" not in html.partition("<style>")[0]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    folder = ROOT / "moec" / "inspect" / "exploration" / "web" / "dagre"
    library = (folder / "dagre.min.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() in html  # as MIT asks of copies
