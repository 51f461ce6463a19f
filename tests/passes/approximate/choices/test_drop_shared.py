"""A layer without its shared expert, and what counts as one."""

from __future__ import annotations

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse
from moec.passes.approximate.choices.drop_shared import drop_shared, shared_expert_of
from tests.passes.changed import LAYER, layers_of, outputs, tokens

SHARED = """
  s#: f32[B*S, 8] = aten.linear.default(IN, layers.#.v) @ layers.#.shared
  p#: f32[B*S, 8] = aten.silu.default(s#) @ layers.#.shared
"""


def graph(body: str, end: str = "t0") -> Graph:
    params = "router: 4, 8; w1: 4, 6, 8; w3: 4, 6, 8; w2: 4, 8, 6; v: 8, 8; u: 8, 8".split("; ")
    named = ", ".join("layers.0.{}: f32[{}]".format(*param.split(": ")) for param in params)
    text = body.replace("#", "0").replace("IN", "h")
    return parse(f"""
    graph main(ids: i64[B, S]; embed: f32[20, 8], {named}) {{
      size B in [1, inf]
      size S in [1, 64]
      embedded: f32[B, S, 8] = aten.embedding.default(embed, ids)
      h: f32[B*S, 8] = aten.reshape.default(embedded) <shape=({{B*S}}, 8)>{text}
      flat: f32[B*S, 20] = aten.linear.default({end}, embed) @ head
      scores: f32[B, S, 20] = aten.reshape.default(flat) <shape=({{B}}, {{S}}, 20)>
      return scores
    }}""")


def program(body: str, end: str = "t0") -> Program:
    result, generator = graph(body, end), torch.Generator().manual_seed(1)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 2
        for p in result.params
    }
    return Program(result, weights)


ROUTED = LAYER.rpartition("  x#:")[0]
FORMS = {
    "after the sum": SHARED + ROUTED + "  r#: f32[B*S, 8] = aten.add.Tensor(y#, p#)\n"
    "  t#: f32[B*S, 8] = aten.add.Tensor(h, r#)\n",
    "first": SHARED + ROUTED + "  r#: f32[B*S, 8] = aten.add.Tensor(p#, y#)\n"
    "  t#: f32[B*S, 8] = aten.add.Tensor(r#, h)\n",
    "after the residual": SHARED + ROUTED + "  r#: f32[B*S, 8] = aten.add.Tensor(h, y#)\n"
    "  t#: f32[B*S, 8] = aten.add.Tensor(r#, p#)\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_model_without_it(form: str) -> None:
    """Beside the same model with other weights: zeros in the dense network have the result zero."""
    original, ids = program(FORMS[form]), tokens(64)
    shared = shared_expert_of(original, layers_of(original)[0])
    assert (shared.name, shared.origins) == ("layers.0#shared", {"layers.0.shared"})
    without = drop_shared(original, shared, None)
    verify(without.graph, Stage.MOE)
    assert "layers.0.v" not in without.weights
    silent = {**original.weights, "layers.0.v": torch.zeros(8, 8)}
    right = outputs(Program(original.graph, silent), ids)
    torch.testing.assert_close(outputs(without, ids), right, rtol=1e-6, atol=1e-6)
    mean = torch.arange(8.0)
    with_mean = drop_shared(original, shared, mean.double())
    verify(with_mean.graph, Stage.MOE)
    right = right[0] + (mean @ original.weights["embed"].mT)
    torch.testing.assert_close(outputs(with_mean, ids)[0], right, rtol=1e-5, atol=1e-4)


PLAIN = FORMS["first"]
ELSEWHERE = "  q#: f32[B*S, 8] = aten.linear.default(t#, layers.#.{}) @ {}\n"


@pytest.mark.parametrize(
    ("body", "end", "message"),
    [
        (LAYER.replace("x#:", "t#:"), "t0", "nothing dense of its input is added to its result"),
        (  # of another value than the experts' input
            PLAIN.replace("linear.default(IN", "linear.default(z#")
            .replace("\n  s#:", "\n  z#: f32[B*S, 8] = aten.linear.default(ids, layers.#.u)\n  s#:")
            .replace("linear.default(ids", "embedding.default(embed"),
            "t0",
            "nothing dense of its input is added",
        ),
        (  # not by token
            PLAIN.replace("aten.silu.default(s#)", "aten.cumsum.default(s#) <dim=0>"),
            "t0",
            "nothing dense of its input is added",
        ),
        (
            PLAIN.replace("add.Tensor(p#, y#)", "add.Tensor(p#, y#) <alpha=2>"),
            "t0",
            "nothing dense of its input is added",
        ),
        (
            PLAIN + ELSEWHERE.format("v", "other"),
            "q0",
            "a weight of the shared expert is also read elsewhere: layers.0.shared",
        ),
        (
            PLAIN + ELSEWHERE.format("u", "layers.0.shared"),
            "q0",
            "a module computes products of the shared expert and others",
        ),
        (
            PLAIN + "  q#: f32[B*S, 8] = aten.add.Tensor(t#, p#)\n",
            "q0",
            "no linear layer is the shared expert's alone",
        ),
    ],
)
def test_reasons(body: str, end: str, message: str) -> None:
    original = program(body, end)
    with pytest.raises(NoMatch, match=message):
        shared_expert_of(original, layers_of(original)[0])
