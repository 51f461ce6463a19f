"""moec plan and moec routing: what they print, write and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from moec import __main__ as front
from moec.plan.network.cluster import read_cluster
from moec.plan.plan import read_plan
from moec.runtime.call.routing_trace import of_ids, save_trace

MODEL = """
name: small
width: 64
weights: bf16
layers:
- {repeat: 2, attention: 16384, heads: 4, head_width: 16, kv_heads: 4, kv_values: 128,
   experts: 8, k: 2, hidden: 128}
"""


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(front.cli, arguments, prog_name="moec")


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(MODEL)
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t.npz"
    ids = np.random.default_rng(0).zipf(1.5, (400, 2, 2)) % 8
    save_trace(of_ids(ids, 8), path)
    return str(path)


def test_table(model: str, trace: str) -> None:
    result = run("plan", model, "--cluster", "two-sockets", "--trace", trace)
    assert result.exit_code == 0, result.output
    assert "small on one box of 2 sockets: 2 devices" in result.stdout
    assert "1600 choices (measured)" in result.stdout
    assert "data sheet" in result.stdout
    assert "busiest/mean" in result.stdout


def test_phases(model: str) -> None:
    """Tokens and sequences that suit each phase, on 4 of 40 nodes."""
    work = {}
    for phase in ("prefill", "decode", "training"):
        result = run("plan", model, "--cluster", "h800-40", "--nodes", "4", "--phase", phase)
        assert "resized to 4 nodes: 32 devices" in result.stdout, result.output
        work[phase] = result.stdout.splitlines()[1].split("; routing")[0]
    tokens, prompts = 4096 * 32, 2 * 32
    assert work["decode"] == "decode: 4096 tokens a step, 4096 sequences of 2048 tokens"
    assert work["prefill"].startswith(f"prefill: {tokens} tokens a step, {prompts} sequences")
    assert work["training"].startswith(f"training: {tokens} tokens a step, {prompts} sequences")


def test_files(model: str, trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [tmp_path / name for name in ("p.json", "map.json", "p.svg")]
    options = zip(("-o", "--placement", "--picture"), map(str, names), strict=True)
    arguments = [
        "plan", model, "--cluster", "two-sockets", "--trace", trace, "--spare", "0",
        *(part for pair in options for part in pair),
    ]  # fmt: skip
    assert run(*arguments).exit_code == 0
    plan = read_plan(names[0])
    table = json.loads(names[1].read_text())["physical_to_logical_map"]
    assert table == [[e for held in layer.slots for e in held] for layer in plan.layers]
    picture = names[2].read_text()
    titles = [f"Load of {name}, small on one box of 2 sockets" for name in ("ranks", "links")]
    assert all(f"<!-- {title} -->" in picture for title in titles)
    again = run(*arguments)
    assert again.exit_code == 1
    assert "exists; --force replaces it" in again.stderr
    other = run("plan", model, "--cluster", "h100-8", "--compare", str(names[0]))
    assert "this plan" in other.stdout


def test_json_and_explanation(model: str) -> None:
    plan = json.loads(run("plan", model, "--cluster", "h100-8", "--json").stdout)
    assert plan["devices"] == 8
    assert {number["source"] for number in plan["numbers"]} == {"data sheet", "assumed", "measured"}
    text = run("plan", model, "--cluster", "h100-8", "--explain", "1").stdout
    assert "combinations of degrees considered" in text
    assert any(line.startswith(">") for line in text.splitlines())


def test_a_token_with_many_experts_on_a_node_goes_there_once(model: str) -> None:
    """Few nodes, many choices and many tokens: fewer bytes across are worth the copies."""
    Path(model).write_text(MODEL.replace("k: 2", "k: 8").replace("experts: 8", "experts: 64"))
    arguments = ["plan", model, "--cluster", "cpu-8-nodes", "--tokens", "65536"]
    text = run(*arguments, "--explain", "1").stdout
    forms = re.findall(r"TP 1, EP 4, 64 slots, (\w+) .* exchange out", text)
    assert forms[0] == "deduplicated"


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["--cluster", "no"], "no is neither a file nor a preset"),
        (2, ["--cluster", "h100-8", "--nodes", "2"], "has no links between nodes"),
        (2, ["--measure", "m.yaml", "--nodes", "2"], "--nodes is for a --cluster; --nproc is the"),
        (2, ["--cluster", "h100-8", "--routing", "odd"], "odd is not a distribution"),
        (2, ["--cluster", "h100-8", "--spare", "x"], "write shares such as 0,0.125"),
        (2, ["--cluster", "h100-8", "--explain", "7"], "the model has 2 layers"),
        (2, ["--cluster", "h100-8", "--send", "f3"], "f3 is not one of"),
        (2, ["--cluster", "h100-8", "--compute", "int8"], "has no FLOP/s for int8"),
        (1, ["--cluster", "h100-8", "--trace", "no.npz"], "no.npz does not exist"),
        (2, ["--cluster", "h100-8", "--picture", "p.pdf"], "a picture ends in .png or .svg"),
        (1, ["--cluster", "h100-8", "--compare", "no.json"], "no.json"),
        (2, ["--cluster", "h100-8", "--latency", "0"], "--latency 0.0: write seconds above 0"),
        (2, ["--cluster", "h100-8", "--latency", "nan"], "--latency nan: write seconds above 0"),
        (2, ["--cluster", "h100-8", "--routing", "lognormal:99"], "a parameter of at most 20"),
        (1, ["--cluster", "h100-8", "--picture", "no/p.svg"], "no does not exist: create it first"),
        (1, ["--cluster", "h100-8", "--picture", "x" * 300], "x is not a valid file name: "),
        (2, ["--cluster", "h100-8", "--explain", "1", "--json"], "leave out --explain and"),
    ],
)
def test_refusals(
    model: str, code: int, arguments: list[str], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    result = run("plan", model, *arguments, "-o", str(output))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not output.exists()


def test_a_trace_of_another_model(trace: str) -> None:
    result = run("plan", "mixtral-8x7b", "--cluster", "h100-8", "--trace", trace)
    words = "is of another model: it has 2 MoE layers, of 8 experts, Mixtral-8x7B has 32 MoE layers"
    assert words in result.stderr


def test_a_plan_of_another_model(model: str, tmp_path: Path) -> None:
    mixtral, output = tmp_path / "mixtral.json", tmp_path / "plan.json"
    run("plan", "mixtral-8x7b", "--cluster", "h100-8", "-o", str(mixtral))
    result = run("plan", model, "--cluster", "h100-8", "--compare", str(mixtral), "-o", str(output))
    assert result.exit_code == 1
    assert "is a plan of Mixtral-8x7B, whose layers or experts are not those of" in result.stderr
    assert not output.exists()


def test_a_placement_that_no_engine_reads(model: str, tmp_path: Path) -> None:
    """Nothing is written, the plan neither."""
    groups, *names = (tmp_path / name for name in ("groups.yaml", "p.json", "map.json"))
    groups.write_text("text: [0, 3, 5, 6, 1]\nimage: [7]\naudio: [2, 4]\n")
    options = ("--sequences", "0", "--groups", str(groups))
    output = ("-o", str(names[0]), "--placement", str(names[1]))
    result = run("plan", model, "--cluster", "cpu-8-nodes", *options, *output)
    assert result.exit_code == 2
    assert "vLLM and SGLang need equal numbers" in result.stderr
    assert not any(name.exists() for name in names)


def test_routing(trace: str, tmp_path: Path) -> None:
    result = run("routing", trace)
    assert result.exit_code == 0, result.output
    assert "400 tokens, 1600 choices, 2 layers" in result.stdout
    assert "strongest pair" in result.stdout
    assert len(json.loads(run("routing", trace, "--json").stdout)) == 2


@pytest.mark.parametrize(
    ("name", "head"),
    [("load.png", b"\x89PNG\r\n"), ("load.svg", b"<?xml version=")],
)
def test_pictures_of_routing(name: str, head: bytes, trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("routing", trace, "--picture", str(tmp_path / name))
    assert f"wrote {tmp_path / name}" in result.stdout, result
    assert (tmp_path / name).read_bytes().startswith(head)


def test_no_package_for_a_picture(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.plan.report.heat_map.find_spec", lambda name: None)
    result = run("routing", trace, "--picture", str(tmp_path / "load.png"))
    assert "a picture needs matplotlib: pip install 'moec[bench]'" in result.stderr
    assert not (tmp_path / "load.png").exists()


def test_routing_refuses(tmp_path: Path) -> None:
    counts = tmp_path / "c.npy"
    np.save(counts, np.ones((2, 4)))
    result = run("routing", str(counts), "-o", str(tmp_path / "t.npz"))
    assert "a trace needs the experts of each token" in result.stderr
    result = run("routing", str(counts), "-o", str(tmp_path / "t.txt"))
    assert "the name of a trace ends in .npz" in result.stderr
    result = run("routing", str(counts), "-o", str(tmp_path / "no" / "t.npz"))
    assert f"the folder {tmp_path / 'no'} does not exist" in result.stderr


@pytest.fixture
def small_nodes(tmp_path: Path) -> str:
    """Two nodes of two devices, none of which has memory for all experts."""
    cluster = msgspec.to_builtins(read_cluster("cpu-8-nodes"))
    cluster["levels"][1]["joins"] = 2
    cluster["device"]["memory"]["value"], cluster["device"]["reserved"]["value"] = 4.3e5, 0
    path = tmp_path / "nodes.yaml"
    path.write_text(json.dumps(cluster))
    return str(path)


def test_experts_that_meet_are_placed_together(
    model: str, small_nodes: str, tmp_path: Path
) -> None:
    """Tokens choose 0 and 2, 1 and 3, 4 and 6, or 5 and 7. The plan says to how many nodes and
    ranks their rows go."""
    pairs = np.array([[0, 2], [1, 3], [4, 6], [5, 7]])
    layers = [pairs[np.random.default_rng(n).permutation(400) % 4] for n in range(2)]
    save_trace(of_ids(np.stack(layers, 1), 8), tmp_path / "t.npz")
    options = (
        "plan", model, "--cluster", small_nodes, "--trace", str(tmp_path / "t.npz"), "--spare", "0",
        "--sequences", "0",
    )  # fmt: skip
    output = run(*options).stdout
    counts = re.search(
        r"a row goes to ([\d.]+) other nodes \(([\d.]+)\) and ([\d.]+) other ranks \(([\d.]+)\)",
        output,
    )
    assert counts is not None, output
    nodes, nodes_by_load, ranks, ranks_by_load = map(float, counts.groups())
    # One of two nodes, and one of four ranks, is the row's own.
    assert (nodes, ranks) == (pytest.approx(0.5, abs=0.1), pytest.approx(0.75, abs=0.1))
    assert nodes < nodes_by_load
    assert ranks < ranks_by_load
    assert json.loads(run(*options, "--json").stdout)["layers"][0]["sends"]["ranks"] < ranks_by_load


def test_modalities_have_ranks_of_their_own(model: str, small_nodes: str, tmp_path: Path) -> None:
    groups, output = tmp_path / "groups.yaml", tmp_path / "plan.json"
    groups.write_text("text: [0, 3, 5, 6]\nimage: [1, 7]\naudio: [2, 4]\n")
    options = ("plan", model, "--cluster", small_nodes, "--sequences", "0", "--groups", str(groups))
    result = run(*options, "-o", str(output))
    assert result.exit_code == 0, result.output
    assert "experts of layers 0-1: text ranks 0-1, image rank 2, audio rank 3" in result.stdout
    for layer in read_plan(output).layers:
        assert {*layer.slots[0], *layer.slots[1]} == {0, 3, 5, 6}
        assert layer.slots[2:] == ((1, 7), (2, 4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [0, 1]", "expert 2 is in 0 groups; each of the experts 0 to 7, and no other"),
        ("a: []", "a group has no expert; write a line such as text: [0, 1]"),
        ("[1, 2]", "write a line such as text: [0, 1]"),
        ("a: [0, 1, 2, 3]\nb: [4, 5]\nc: [6, 7]", "3 groups of experts cannot have ranks of"),
    ],
)
def test_groups_that_are_refused(model: str, tmp_path: Path, text: str, words: str) -> None:
    groups, output = tmp_path / "groups.yaml", tmp_path / "plan.json"
    groups.write_text(text)
    options = ("--cluster", "two-sockets", "--groups", str(groups))
    result = run("plan", model, *options, "-o", str(output))
    assert result.exit_code == (2 if "cannot have" in words else 1)
    assert words in result.stderr
    assert not output.exists()


def test_routing_with_a_part_in_memory(trace: str, tmp_path: Path) -> None:
    result = run("routing", trace, "--cache")
    assert result.exit_code == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split()[:4] == ["policy", "12%", "in", "memory"]
    assert [row.split()[0] for row in rows[:6]] == ["lru", "slru", "lfu", "lfu", "lfu", "pinned"]
    shown = json.loads(run("routing", trace, "--cache", "--json").stdout)
    assert [row["policy"] for row in shown["policies"] if row["best"]]
    page = run("routing", trace, "--cache", "--picture", str(tmp_path / "hits.svg"))
    assert "--picture draws the loads of experts: leave it or --cache out" in page.stderr
    np.save(tmp_path / "counts.npy", np.ones((2, 8), np.int64))
    counts = run("routing", str(tmp_path / "counts.npy"), "--cache")
    assert "has counts only; --cache needs the experts of each token" in counts.stderr
