"""aggregate-experts: the experts of two models, as one model would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moec
from moec.errors import UsageError
from moec.ir.graph import Program, Stage
from moec.ir.text import parse, print_graph
from moec.passes.approximate.aggregate_experts import AggregateExperts
from moec.passes.calibration.session import CalibrationSession
from moec.passes.core.options import parse_pass
from moec.passes.core.runner import PassResult, run
from moec.pipeline import choose, exact, prepare
from tests.capture.modules import WIDTH, Moe
from tests.passes.changed import LAYER, graph, outputs, program, tokens


def other(first: Program, seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) / 2
        for name, tensor in first.weights.items()
    }


def aggregated(first: Program, weights: Any, average: bool = True) -> PassResult:
    return run(first, [AggregateExperts(weights, average)], stage=Stage.MOE)[-1]


def whole(first: Program, second: dict[str, torch.Tensor], average: bool) -> Program:
    """The model with all experts, written out: eight where each of the two has four."""
    text = print_graph(first.graph).replace("num_experts=4", "num_experts=8")
    for old in ("B*S, 4]", "[4, 8]", "[4, 6, 8]", "[4, 8, 6]", "i32[4]"):
        text = text.replace(old, old.replace("4", "8", 1))
    graph = parse(text)
    weights = {}
    for name, a in first.weights.items():
        joined = name.startswith("layers.")
        mean = (a + second[name]) / 2 if average else a
        weights[name] = torch.cat([a, second[name]]) if joined else mean
    return Program(graph, weights)


def test_text(golden: Any) -> None:
    first = program(1)
    golden(print_graph(aggregated(first, other(first)).program.graph))


@given(average=st.booleans(), seed=st.integers(0, 99), count=st.sampled_from([16, 64]))
def test_the_union_routed_by_all_logits(average: bool, seed: int, count: int) -> None:
    first = program()
    second = other(first, seed)
    step = aggregated(first, second, average)
    ids = tokens(count, seed)
    result, right = outputs(step.program, ids), outputs(whole(first, second, average), ids)
    torch.testing.assert_close(result, right, rtol=1e-6, atol=1e-6)  # sums in another order
    assert step.says == ("layers.0: 4 and 4 experts", "layers.1: 4 and 4 experts")


def test_corrections_are_joined_too() -> None:
    layer = LAYER.replace("moe.route(logits#)", "moe.route(logits#, c#)").replace(
        "  w#:", "  c#: f32[4] = aten.sum.dim_IntList(layers.#.router) <dim=(1)>\n  w#:", 1
    )
    first = program(1, layer)
    step = aggregated(first, other(first))
    (c,) = [p for p in step.program.graph.params if p.name.startswith("c0")]
    expected = torch.cat([w["layers.0.router"].sum(1) for w in (first.weights, other(first))])
    assert torch.equal(step.program.weights[c.name], expected)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            LAYER.replace("moe.route(logits#)", "moe.route(t#)").replace(
                "  w#:", "  t#: f32[B*S, 4] = aten.tanh.default(logits#)\n  w#:", 1
            ),
            "aggregate-experts at layers.0: the router's logits do not come from a linear layer",
        ),
        (
            LAYER.replace("renormalize=true", "groups=2, top_groups=2"),
            "at layers.0: the router chooses among groups of experts, which differ between models",
        ),
    ],
)
def test_layers_that_do_not_go_together(layer: str, says: str) -> None:
    first = program(1, layer)
    with pytest.raises(UsageError, match=says):
        aggregated(first, other(first))


def test_weights_that_do_not_go_together() -> None:
    first = program(1)
    second = other(first)
    router = second.pop("layers.0.router")
    with pytest.raises(UsageError, match=r"the other model has no weight layers\.0\.router"):
        aggregated(first, second)
    with pytest.raises(UsageError, match=r"router is \[4, 8\], and \[3, 8\] in the other model"):
        aggregated(first, {**second, "layers.0.router": router[:3]})


def test_whole_numbers_have_no_mean() -> None:
    result = graph(1)
    text = print_graph(result).replace("embed: f32", "places: i64[2], embed: f32", 1).replace(
        "return scores", "back: i64[2] = aten.neg.default(places)\n  return scores, back"
    )  # fmt: skip
    first = Program(parse(text), {**program(1).weights, "places": torch.tensor([1, 2])})
    second = {**other(program(1)), "places": torch.tensor([1, 3])}
    with pytest.raises(UsageError, match="places has different integers in the other model"):
        aggregated(first, second)


def test_what_is_no_model() -> None:
    for wrong in ("", 3):
        with pytest.raises(UsageError, match="other is the second model: give the folder of"):
            aggregated(program(1), wrong)
    assert parse_pass(AggregateExperts, "other=a/b,average=false", "") == AggregateExperts(
        "a/b", False
    )
    with pytest.raises(UsageError, match="changes what the model computes: no"):
        exact(choose(2, "+aggregate-experts(other=a)"), "no")


def test_a_path_is_opened_before_the_passes_run(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\n\ndef model():\n    return torch.nn.Linear(3, 2), (torch.ones(1, 3),)\n"
    )
    session = CalibrationSession(None, {})
    chosen = choose(0, f"+aggregate-experts(other={file}:model)")
    [opened] = [p for p in prepare(chosen, session) if isinstance(p, AggregateExperts)]
    assert opened.other.weight.shape == (2, 3)
    with pytest.raises(UsageError, match="no/such/folder"):
        prepare(choose(0, "+aggregate-experts(other=no/such/folder)"), session)


def test_a_model_without_experts() -> None:
    with pytest.raises(UsageError, match="has no MoE blocks that were recognised"):
        moec.compile(
            torch.nn.Linear(3, 3),
            (torch.randn(2, 3),),
            passes=[AggregateExperts(torch.nn.Linear(3, 3))],
            build=False,
        )


def test_compiled_and_checked() -> None:
    torch.manual_seed(0)
    first, second, x = Moe(), Moe(), torch.randn(64, WIDTH)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter)
    compiled = moec.compile(first, (x,), passes=[AggregateExperts(second)])
    assert [block.experts for block in compiled.blocks] == [8]
    report = " ".join(str(compiled.report()).split())
    assert "the compiled code was compared with the graph that the passes changed" in report
    assert "the distance to the original" not in report
    assert compiled.report().verification[0].error < 1e-5
    logits = torch.cat([x @ m.gate.weight.T for m in (first, second)], -1)
    assert (logits.argmax(-1) >= 4).any()  # so that the second's experts are run
    assert (compiled(x) - first(x)).norm() > 1e-2
