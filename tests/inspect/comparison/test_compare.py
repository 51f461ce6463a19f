"""Two artifacts beside each other: text, numbers, altered experts, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec
from moec.errors import ArtifactError, InputError, UsageError
from moec.inspect.comparison.comparison import ArtifactComparison, ComparedFact, OutputLine
from moec.inspect.exploration.explored_model import weights_of
from moec.report.pass_graphs.table import GraphTable
from tests.command_line import invoke
from tests.once import Once

LAYERS, EXPERTS, VOCABULARY = 2, 8, 100
ALTERED = 5


def language_model(vocabulary: int = VOCABULARY, seed: int = 0) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    config = OlmoeConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_experts=EXPERTS, num_experts_per_tok=2, vocab_size=vocabulary,
        max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


def saved(once: Once, name: str, model: Callable[[], torch.nn.Module], **options: Any) -> Path:
    def write(folder: Path) -> None:
        ids = torch.arange(10).reshape(1, 10)
        moec.compile(model(), (ids,), verify=False, **options).save(folder / f"{name}.moec")

    return once(f"compared-{name}", write) / f"{name}.moec"


def altered_model() -> torch.nn.Module:
    """The last expert projection of one expert of the last layer, doubled."""
    model = language_model()
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[ALTERED] *= 2
    return model


@pytest.fixture(scope="session")
def plain(once: Once) -> Path:
    return saved(once, "plain", language_model, record_routing=True)


@pytest.fixture(scope="session")
def int8(once: Once) -> Path:
    return saved(once, "int8", language_model, record_routing=True, quant="int8")


@pytest.fixture(scope="session")
def other(once: Once) -> Path:
    """A model with other weights everywhere."""
    return saved(once, "other", lambda: language_model(seed=1), record_routing=True)


@pytest.fixture(scope="session")
def altered(once: Once) -> Path:
    return saved(once, "altered", altered_model)


run = partial(invoke, "compare")


def facts(comparison: ArtifactComparison) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {(fact.subject, fact.name): (fact.a, fact.b) for fact in comparison.facts}


FIXED = ArtifactComparison(
    (
        ComparedFact("artifact", "", "one.moec", "two\x1b.moec"),
        ComparedFact("bytes", "experts", 6_300_000, 3_200_000),
        ComparedFact("kernels", "grouped", 4, None),
        ComparedFact("sizes", "S", "1 to 64", "1 to any"),
    ),
    {"layers.1.down_proj.packed": (2, 3, 4, 7), "norm.weight": ()},
    "1 x input_ids[1, 256]",
    (
        OutputLine("logits", 0.01514, 7, 256, 0.1234, 0.66, 0.00141),
        OutputLine("hidden", 0.0, 0, 256, 0.0, 1.0, None),
    ),
    {"layers.0.mlp": 1.0, "layers.1.mlp": 0.984375},
    {"decode step": {"a": 0.58, "b": 0.547, "ratio": 0.93, "low": 0.83, "high": 1.11}},
    ("something else is not compared",),
)


def test_text(golden: Callable[[str], None]) -> None:
    golden(str(FIXED))


def test_json_and_html() -> None:
    data = json.loads(json.dumps(FIXED.to_dict()))
    assert data["outputs"][0]["kl"] == 0.00141
    assert data["facts"][2] == {"subject": "kernels", "name": "grouped", "a": 4, "b": None}
    html = ArtifactComparison((ComparedFact("artifact", "", "<b>", "x"),))._repr_html_()
    assert html.startswith("<pre>")
    assert "&lt;b&gt;" in html


def test_equal_artifacts(plain: Path) -> None:
    comparison = moec.compare(plain, moec.load(plain), prompt_tokens=40)
    (line,) = comparison.outputs
    assert (line.error, line.moved, line.rows, line.margin, line.kl) == (0, 0, 40, 0, 0)
    assert line.gap > 0
    assert comparison.routing == {f"model.layers.{n}.mlp": 1.0 for n in range(LAYERS)}
    assert not comparison.altered
    assert not comparison.notes
    assert all(fact.a == fact.b for fact in comparison.facts)


def test_codes_of_4_bits_are_half_a_byte(plain: Path, once: Once) -> None:
    int4 = saved(once, "int4", language_model, quant="int4:32", kv_cache=False)
    rows = facts(moec.compare(plain, int4))
    weights = LAYERS * EXPERTS * 3 * 64 * 96
    assert rows["bytes", "experts"] == (4 * weights, weights // 2 + 2 * weights // 32)


def test_a_graph_of_codes_of_4_bits() -> None:
    ids = torch.arange(10).reshape(1, 10)
    model = moec.compile(language_model(), (ids,), build=False, quant="int4:32")
    weights = LAYERS * EXPERTS * 3 * 64 * 96
    lines = [line for line in weights_of(model.graph) if line.kind == "experts"]
    assert sum(line.bytes for line in lines) == weights // 2 + 2 * weights // 32


def test_int8_beside_float32(plain: Path, int8: Path) -> None:
    ids = np.random.default_rng(1).integers(VOCABULARY, size=(2, 30))
    comparison = moec.compare(plain, int8, {"input_ids": ids})
    rows = facts(comparison)
    assert rows["format", "experts"] == ("f32", "int8")
    assert rows["format", "linears"] == rows["format", "head"] == ("f32", "f32")
    weights = LAYERS * EXPERTS * 3 * 64 * 96
    scales = LAYERS * EXPERTS * (2 * 96 + 64)
    assert rows["bytes", "experts"] == (4 * weights, weights + 2 * scales)
    assert rows["ops of main", "grouped.quantised"] == (None, 2 * LAYERS)
    assert rows["ops of decode", "grouped.quantised"] == (None, 2 * LAYERS)
    assert rows["bytes", "weights/"][1] < rows["bytes", "weights/"][0]

    (line,) = comparison.outputs
    assert 0 < line.error < 0.05  # codes are within 1/254 of a row's greatest weight
    assert line.kl is not None
    assert 0 < line.kl < line.error
    assert min(comparison.routing.values()) > 0.5


def test_graphs_differ_where_ops_do(plain: Path, int8: Path) -> None:
    """In both products of a layer's experts alone: the numbers in names of values are others in
    `decode`, and some ops are in other kernels, whose lines they have."""
    graphs = moec.compare(plain, int8, prompt_tokens=4).graphs
    assert set(graphs) == {"main", "decode"}
    for steps in graphs.values():
        assert [step.name for step in steps] == ["A", "B"]
        assert sum(bool(op.line) for op in steps[0].graph.ops) > 10
        _, b = GraphTable().steps(steps)
        assert sum(removed for _, removed, _ in b.hunks) == 2 * LAYERS


def test_numbers_by_their_definitions(plain: Path, other: Path) -> None:
    """In float64. moec computes them in float32, whose rounding of log-probabilities, 2**-24 of
    values below 8, may change a KL by 1e-6."""
    ids = np.random.default_rng(1).integers(VOCABULARY, size=(2, 30))
    (line,) = moec.compare(plain, other, {"input_ids": torch.tensor(ids)}).outputs
    a, b = (
        moec.load(path)(ids).reshape(-1, VOCABULARY).astype(np.float64) for path in (plain, other)
    )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    assert line.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert line.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-6)
    assert (line.moved, line.rows) == ((a.argmax(-1) != b.argmax(-1)).sum(), 60)
    best = np.sort(a, -1)[:, ::-1]
    middle = np.sort(best[:, 0] - best[:, 1])[29]  # torch's median is the lower of the two
    assert line.gap == pytest.approx(middle, abs=1e-6)
    gaps = best[:, 0] - a[np.arange(60), b.argmax(-1)]
    assert line.margin == pytest.approx(gaps.max(), abs=1e-6)


def test_routing_is_compared_by_sets(plain: Path, other: Path) -> None:
    """The share of a layer is that of the tokens whose recorded sets are equal."""
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(1, 400))
    sets = []
    for path in (plain, other):
        model = moec.load(path)
        with model.record_routing() as recorder:
            model(ids)
        sets.append(
            [[set(token) for token in layer] for layer in recorder.trace().ids.swapaxes(0, 1)]
        )
    shares = [
        np.mean([x == y for x, y in zip(a, b, strict=True)]) for a, b in zip(*sets, strict=True)
    ]
    assert list(moec.compare(plain, other, {"input_ids": ids}).routing.values()) == shares


def test_an_altered_expert_is_named(plain: Path, altered: Path) -> None:
    comparison = moec.compare(plain, altered, prompt_tokens=60)
    layer = f"model.layers.{LAYERS - 1}.mlp.experts.down_proj"
    assert comparison.altered == {f"{layer}.packed": (ALTERED,)}
    (line,) = comparison.outputs
    assert line.error > 1e-4  # float32 alone: 1e-6
    assert not comparison.routing  # only one records it


def test_another_vocabulary(once: Once, plain: Path) -> None:
    larger = saved(once, "larger", lambda: language_model(VOCABULARY + 20))
    for pair, reason in (
        ((plain, larger), "A has logits[1, 256, 100], and B logits[1, 256, 120]"),
        ((larger, plain), "B refuses inputs: input 'input_ids' holds"),
    ):
        comparison = moec.compare(*pair)
        (note,) = comparison.notes
        assert note.startswith(f"outputs are not compared: {reason}")
        assert not comparison.outputs
        assert facts(comparison)["format", "experts"] == ("f32", "f32")


class Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


class Renamed(Scaled):
    def forward(self, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.linear(y) * self.factor


class Complex(Scaled):
    """Only imaginary parts depend on the factor; a second output has no axis."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return torch.complex(y, y * self.factor), y.sum()


def other_model(once: Once, name: str, kind: type[Scaled], factor: float) -> Path:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = moec.compile(kind(factor).eval(), (torch.zeros(3, 8),), verify=False)
        model.save(folder / f"{name}.moec")

    return once(f"compared-{name}", write) / f"{name}.moec"


def test_models_without_text(once: Once) -> None:
    one, two = (other_model(once, f"scaled{n}", Scaled, n) for n in (1, 2))
    comparison = moec.compare(one, two, time=True)
    (line,) = comparison.outputs
    assert line.error == pytest.approx(1, rel=1e-5)  # |2 y - y| / |y|
    assert (line.moved, line.kl) == (0, None)
    assert comparison.inputs == "4 x x[3, 8]"
    call = comparison.times["call"]
    assert 0 < call["low"] <= call["ratio"] <= call["high"]
    assert min(call["a"], call["b"]) > 0
    renamed = other_model(once, "renamed", Renamed, 1)
    (note,) = moec.compare(one, renamed, time=True).notes
    assert note.startswith("outputs are not compared: B refuses inputs: there is no input 'x'")
    with pytest.raises(InputError, match="continues no text: leave out the prompt and its tokens"):
        moec.compare(one, two, prompt_tokens=3)


def test_a_compiled_model_beside_an_artifact(once: Once, temporary_files: Path) -> None:
    """It is compared as the artifact that it would be saved as, which is removed."""
    torch.manual_seed(0)
    model = moec.compile(Scaled(1).eval(), (torch.zeros(3, 8),), verify=False)
    two = other_model(once, "scaled2", Scaled, 2)
    assert not any(temporary_files.iterdir())
    for pair, error in (((model, two), 1.0), ((two, model), 0.5)):
        comparison = moec.compare(*pair, time=True)
        assert comparison.outputs[0].error == pytest.approx(error, rel=1e-5)
        assert comparison.times["call"]["a"] > 0
        names = ("Scaled", "scaled2.moec")
        assert set(facts(comparison)["artifact", ""]) == set(names)
        assert not any(temporary_files.iterdir())
    with pytest.raises(UsageError, match="the model was not built: leave out stop_after"):
        moec.compare(moec.compile(Scaled(1).eval(), (torch.zeros(3, 8),), build=False), two)


BLOCK = """
import torch
from tests.inspect.exploration.modules import Routed

def model():
    torch.manual_seed(0)
    return Routed().eval(), (torch.randn(8, 16),)
"""


def test_the_command_with_a_model(tmp_path: Path) -> None:
    """It gets the functions of the artifact, so that routing is compared, and is verified."""
    source, artifact, page = (tmp_path / name for name in ("block.py", "block.moec", "page.html"))
    source.write_text(BLOCK)
    compiled = moec.compile(f"{source}:model", record_routing=True, verify=False)
    compiled.save(artifact)
    result = run(f"{source}:model", artifact, "--json", "-o", page)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["outputs"][0]["error"] == 0
    assert list(data["routing"].values()) == [1.0]
    assert "graphs" not in data
    rows = {(f["subject"], f["name"]): (f["a"], f["b"]) for f in data["facts"]}
    assert rows["functions", ""] == ("main, recorded", "main, recorded")
    assert rows["artifact", ""] == ("model", "block.moec")
    ((error, unknown),) = (sides for (subject, _), sides in rows.items() if "eager" in subject)
    assert float(error) < 1e-4
    assert unknown is None
    assert "<title>model and block.moec</title>" in page.read_text()
    assert run(artifact, artifact, "-o", page, "-q").output == ""
    assert "<title>block.moec and block.moec</title>" in page.read_text()


def test_complex_and_scalar_outputs(once: Once) -> None:
    """|(y + 3iy) - (y + iy)| / |y + iy| = 2 / sqrt(2)."""
    one, three = (other_model(once, f"complex{n}", Complex, n) for n in (1, 3))
    errors = sorted(line.error for line in moec.compare(one, three).outputs)
    assert errors == [0, pytest.approx(2**0.5, rel=1e-5)]


def test_the_command(plain: Path, int8: Path, tmp_path: Path) -> None:
    result = run(plain, int8, "--prompt-tokens", 20, "--time", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["outputs"][0]["rows"] == 20
    assert set(data["times"]) == {"prefill of 20", "decode step"}
    np.savez(tmp_path / "x.npz", input_ids=np.zeros((1, 3), np.int64))
    result = run(plain, int8, "-i", tmp_path / "x.npz")
    assert "ran on 1 x input_ids[1, 3]" in result.stdout


def test_refusals(plain: Path, tmp_path: Path, tiny_moe: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"is not a moec artifact \(has no manifest\.json\): compile it"
    ):
        moec.compare(plain, tiny_moe)
    with pytest.raises(UsageError, match="cannot be combined: give one of them"):
        moec.compare(plain, plain, prompt="a", prompt_tokens=3)
    for code, arguments, sentence in (
        (1, (plain, tmp_path / "none.moec"), "none.moec"),
        (2, (tiny_moe, tiny_moe), "is an artifact: compile one of them first"),
        (2, (plain, plain, "--dtype", "bf16"), "--dtype is of models, and both are artifacts:"),
        (2, (plain, plain, "-o", "x.txt"), "-o x.txt: the name must end in .html"),
        (1, (plain, plain, "--prompt", "a"), "tokenizer"),
        (1, (plain, plain, "-i", tmp_path / "none.npz"), "there is no such file"),
    ):
        result = run(*arguments)
        assert result.exit_code == code
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
