"""The lower bound of a call's time, the baselines, and the computation of the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.commands.bench import command
from moec.errors import UsageError
from moec.inspect.bench.contenders import Contender, compiled, transformers
from moec.inspect.bench.race import Figure, Load, race
from moec.inspect.bench.result import MeasuredLimits, plot, result
from moec.ir.text import parse
from moec.report.profile.cost import Cost, cost

GRAPH = """\
graph step(x: bf16[B*S, 8], ends: i32[4], q: f32[B, 4, S, 2], k: f32[B, 2, L, 2], first: i64[B]; \
w: bf16[16, 8], gate: bf16[4, 8], up: bf16[4, 6, 8], down: bf16[4, 8, 6]) {
  size B in [0, inf]
  size S in [1, inf]
  size L in [1, inf]
  y: bf16[B*S, 16] = aten.linear.default(x, w)
  weights: bf16[B*S, 2], experts: i64[B*S, 2] = moe.gate(x, gate) <k=2, compute=bf16, logits=bf16>
  order: i32[2*B*S], slots: i32[B*S, 2], found: i32[4] = moe.sort(experts) <num_experts=4>
  h: bf16[2*B*S, 6] = grouped.linear(x, found, up, order) <matrices=1, dtype=bf16, gather=2>
  o: f32[2*B*S, 8] = grouped.linear(h, found, down) <matrices=1, dtype=f32>
  a: f32[B, 4, S, 2] = nn.attention(q, k, k, first) <scale=1.0, causal=true, placed=true>
  return y, o, a
}
"""


def test_the_least_that_a_call_costs() -> None:
    """One token of two texts: 4 rows of experts; all counted by hand."""
    result = cost(parse(GRAPH), {"B": 2, "S": 1, "L": 32}, context=10)
    linear, gate = 2 * 2 * 16 * 8, 2 * 2 * 4 * 8
    experts = 2 * 4 * (6 * 8 + 8 * 6)
    attention = 2 * (2 * 4) * 10 * (2 + 2)
    assert result.flops == linear + gate + experts + attention
    share = 1 - (1 - 1 / 4) ** 4
    weights = 2 * 16 * 8 + 2 * 4 * 8 + share * 2 * 4 * (6 * 8 + 8 * 6)
    caches = 2 * 2 * 10 * (2 + 2) * 4
    assert result.bytes == pytest.approx(weights + caches)


def test_codes_of_four_bits() -> None:
    """Two rows by experts of 16 x 32 codes with a scale for each block of 32."""
    text = (
        "graph step(x: f32[2, 32], ends: i32[4]; codes: u8[4, 16, 32], scales: bf16[4, 16, 1]) {\n"
        "  y: f32[2, 16] = grouped.quantised(x, ends, codes, scales) "
        '<matrices=1, dtype=f32, kind="int4">\n  return y\n}\n'
    )
    result = cost(parse(text), {}, context=0)
    assert result.flops == 2 * 2 * 16 * 32
    assert result.bytes == (1 - 0.75**2) * (4 * 16 * 32 / 2 + 4 * 16 * 2)


def test_a_linear_layer_of_four_bits() -> None:
    text = (
        "graph step(x: f32[2, 3, 32]; codes: u8[16, 32], scales: bf16[16, 1]) {\n"
        '  y: f32[2, 3, 16] = nn.quantised_linear(x, codes, scales) <kind="int4">\n'
        "  return y\n}\n"
    )
    assert cost(parse(text), {}, context=0) == Cost(2 * 6 * 16 * 32, 16 * 32 / 2 + 16 * 2)


def test_compressed_experts_cost_what_their_parts_hold() -> None:
    """Two rows by experts of 16 x 32 weights in 40 codewords."""
    text = (
        "graph step(x: f32[2, 32], ends: i32[4]; s: i16[40], t: i32[65], g: bf16[4, 16, 2]) {\n"
        "  y: f32[2, 16] = grouped.compressed(x, ends, s, t, g) "
        '<matrices=1, dtype=f32, kind="ternary">\n  return y\n}\n'
    )
    result = cost(parse(text), {}, context=0)
    assert result.flops == 2 * 2 * 16 * 32
    assert result.bytes == (1 - 0.75**2) * (2 * 40 + 4 * 65 + 2 * 4 * 16 * 2)


def test_a_prompt_sees_half_of_itself() -> None:
    prompt = cost(parse(GRAPH), {"B": 1, "S": 10, "L": 32}, context=10)
    without = cost(parse(GRAPH), {"B": 1, "S": 10, "L": 32}, context=0)
    assert prompt.flops - without.flops == 2 * (4 * 10) * 10 * 4
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


@dataclass
class Fake:
    """Records its inputs."""

    fed: list[list[list[int]]] = field(default_factory=list)

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        self.fed.append([list(text) for text in tokens])


def test_all_are_fed_the_same_in_turn() -> None:
    sessions: dict[str, list[Fake]] = {"a": [], "b": []}
    order: list[str] = []

    def contender(name: str) -> Contender:
        def start(texts: int, room: int) -> Fake:
            assert (texts, room) == (2, 5)
            order.append(name)
            sessions[name].append(Fake())
            return sessions[name][-1]

        return Contender(name, start)

    times = race([contender("a"), contender("b")], Load(2, 3, 2, 9), rounds=2)
    assert order == ["a", "b"] * 3  # the first round is not measured
    assert [(t.name, len(t.prefill), len(t.decode)) for t in times] == [("a", 2, 4), ("b", 2, 4)]
    assert all(s.fed == sessions["a"][0].fed for entry in sessions.values() for s in entry)
    assert [[len(text) for text in fed] for fed in sessions["a"][0].fed] == [[3, 3], [1, 1], [1, 1]]


def test_figures() -> None:
    figure = Figure.of([1.0, 2.0, 4.0, 8.0, 16.0], tokens=8)
    assert (figure.low, figure.median, figure.high) == (1.0, 2.0, 4.0)


def test_baselines_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="--baseline vllm: no baseline has this name; there are"):
        transformers(["eager", "vllm"], lambda: None)


@pytest.fixture(scope="module")
def saved(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.moec"
    compiled_tiny_moe.save(path)
    return path


def test_a_race_with_transformers(
    saved: Path, tiny_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--artifact", str(saved), "--baseline", "eager", "--prompt-tokens", "5"]
    words += ["--new-tokens", "2", "--rounds", "1", "--json", "--plot", str(tmp_path / "b.svg")]
    words += ["--append", str(tmp_path / "results.md")]
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    command.main([str(tiny_moe), *words], standalone_mode=False)
    torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    ours, eager = report["lines"]
    assert (ours["name"], eager["name"]) == ("moec", "eager")
    assert ours["decode_ahead"] == 1.0
    assert eager["decode"]["median"] > 0
    assert report["limits"]["peak"] > 1e9
    assert report["decode_share"] > 0  # a small model may beat the memory: it stays in the cache
    written = (tmp_path / "results.md").read_text()
    assert written.startswith("\n## checkpoint, bf16, 1 x 5 tokens\n\n")
    assert "\n    $ moec" in written
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_moec_and_eager_compute_the_same(saved: Path, tiny_moe: Path) -> None:
    """Both sides compute the same work. Four layers in bf16 with different rounding, and a near tie
    of router scores in one: another token or position would differ by at least a half."""
    from transformers import AutoModelForCausalLM

    (eager,) = transformers(["grouped_mm"], lambda: AutoModelForCausalLM.from_pretrained(tiny_moe))
    sessions = [c.open(2, 8) for c in (compiled(moec.load(saved).executor), eager)]
    for tokens in ([[5, 6, 7], [8, 9, 10]], [[4], [300]]):
        a, b = (torch.as_tensor(session.feed(tokens)).float() for session in sessions)
        assert (a - b).abs().max() <= 5e-2 * b.abs().max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "x.jpg"], "--plot x.jpg: the name must end in .png, .svg or .pdf"),
        (["--baseline", "eager"], "give the checkpoint that it was compiled from, and "),
        (["--prompt-tokens", "1020"], r"1020 \+ 32 tokens are requested, and the model takes"),
    ],
)
def test_what_cannot_be_raced(saved: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command.main([str(saved), *words, "-q"], standalone_mode=False)


def test_the_text() -> None:
    times: Any = race([Contender("moec", lambda texts, room: Fake())], Load(1, 4, 2, 9), 1)
    record = result(
        "toy",
        "f32",
        "a machine",
        2,
        {},
        Load(1, 4, 2, 9),
        MeasuredLimits("float32", 1e9, 2e9, 1e-9, 1e-9),
        times,
        0.5,
    )
    lines = str(record).splitlines()
    assert lines[0] == "toy, f32, 2 threads, a machine"
    assert (
        lines[1]
        == "measured peak 1 GFLOP/s in float32, bandwidth 2.0 GB/s, load average 0.5 before"
    )
    assert lines[5].startswith("moec ")
    busy = str(replace(record, load_average=2.14)).splitlines()
    assert busy[:-1] == [line.replace("average 0.5", "average 2.1") for line in lines]
    assert busy[-1].startswith(
        "Something ran before (load average 2.1): if it still did, the times"
    )
    with pytest.raises((ModuleNotFoundError, ValueError)):  # without matplotlib, the first
        plot(record, Path("x.unknown"))
