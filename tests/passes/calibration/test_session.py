"""Approximate passes: on request, measured, within a budget, and strict compilation."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import moec
from moec.errors import MoecError, UsageError, VerificationError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.calibration.budget import Budget, BudgetError, parse_budget
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator, changed_share
from moec.passes.core.damage import Damage, Distance
from moec.passes.core.names import split
from moec.passes.core.runner import Log
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.simplify.split_packed import SplitPacked
from moec.pipeline import choose
from moec.report.report import Report
from moec.runtime.call.executor import Executor
from tests.capture.modules import WIDTH, Moe
from tests.passes.changed import change, layers_of, outputs, program, tokens

x = torch.randn(5, WIDTH)
data = {"x": torch.randn(64, WIDTH)}
HALF = PruneExperts(keep=0.5)


@pytest.fixture(scope="module")
def pruned() -> moec.CompiledModel:
    torch.manual_seed(0)
    return moec.compile(Moe(), (x,), passes=[PruneExperts(keep=0.75)], calib=data)


def test_the_code_is_that_of_the_changed_graph(pruned: moec.CompiledModel) -> None:
    (step,) = [s for s in pruned.pass_results if s.damage]
    expected = evaluate(step.program.graph, [x], step.program.weights)[0]
    torch.testing.assert_close(pruned(x), expected, rtol=1e-5, atol=1e-5)
    assert (pruned(x) - pruned.captured.eager(x)[0]).norm() > 1e-2  # and not the original's
    (block,) = pruned.blocks
    assert block.experts == 3


def test_the_report_tells_price_and_damage(pruned: moec.CompiledModel) -> None:
    report = pruned.report()
    (damage,) = report.damage
    (layer,) = damage.layers
    assert damage.name == "prune-experts(keep=0.75,by=usage,seed=0,scope=layer)"
    assert damage.tokens == 64
    assert layer.bytes_saved == damage.bytes_before - damage.bytes_after > 0
    assert layer.flops_saved == damage.flops_before - damage.flops_after == 2 * WIDTH
    assert 0 < damage.after.changed < 1
    assert damage.after.error == layer.after.error > 0
    assert damage.after.kl is None  # no language model
    assert report.parameters * 4 == damage.bytes_after
    assert "the compiled code was compared with the graph that the passes changed" in str(report)
    assert "prune-experts(keep=0.75,by=usage,seed=0,scope=layer), on 64 tokens" in str(report)
    assert Report.of_dict(report.to_dict()) == report


def test_measured_on_text() -> None:
    """KL and perplexity are those that torch's own losses give."""
    original = program()
    step = change(original, HALF)[-1]
    damage = step.damage
    assert damage is not None
    ids = tokens()
    right, result = (outputs(p, ids)[0].double() for p in (original, step.program))
    kl = nn.functional.kl_div(
        result.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="sum"
    )
    loss = nn.functional.cross_entropy(result[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert damage.after.kl == pytest.approx(float(kl) / ids.numel(), rel=1e-4)
    assert damage.after.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert damage.after.error == pytest.approx(
        float((result - right).norm() / right.norm()), rel=1e-4
    )
    assert damage.original.kl == damage.original.error == damage.original.changed == 0


def test_the_budget_is_kept_layer_by_layer() -> None:
    original = program(3)
    free = change(original, HALF)[-1].damage
    assert free is not None
    kls = [line.after.kl for line in free.layers]
    assert all(kl is not None and kl > 0 for kl in kls)
    limit = min(kls)  # type: ignore[type-var]
    step = change(original, HALF, limit=f"kl<={limit}")[-1]
    damage = step.damage
    assert damage is not None
    assert damage.after.kl is not None
    assert damage.after.kl <= limit
    undone = [line for line in damage.layers if line.undone]
    assert undone
    assert len(undone) == len(step.declined)
    for line in undone:
        assert line.says.startswith("undone: kl is ")
        assert line.bytes_saved == line.flops_saved == 0
    counts = [op.attrs["num_experts"] for op in step.program.graph.ops if op.name == "moe.dispatch"]
    assert counts == [4 if line.undone else 2 for line in damage.layers]


def test_nothing_is_left_where_the_budget_allows_nothing() -> None:
    original = program()
    step = change(original, HALF, limit="error<=0")[-1]
    assert step.program is original
    assert step.damage is not None
    assert not step.damage.applied
    assert step.damage.after == step.damage.original


def test_two_passes_share_one_budget() -> None:
    """The second is measured from the original, not from what the first made."""
    original = program()
    first, second = change(original, PruneExperts(keep=0.75), HALF)[1:]
    assert first.damage is not None
    assert second.damage is not None
    assert second.damage.original == first.damage.original
    assert second.damage.bytes_before == first.damage.bytes_after
    assert [op.attrs["num_experts"] for op in second.program.graph.ops
            if op.name == "moe.dispatch"] == [2, 2]  # fmt: skip
    assert "is all of them: nothing would change" in "; ".join(
        d.reason for d in change(original, HALF, PruneExperts(keep=0.9))[-1].declined
    )


def test_the_second_pass_counts_from_the_original() -> None:
    """An expert that was renumbered by the first pass is still the same one."""
    original = program(1)
    steps = change(original, PruneExperts(keep=0.75), PruneExperts(keep=2 / 3))
    remaining = torch.arange(4)
    for step in steps[1:]:
        assert step.damage is not None
        (line,) = step.damage.layers
        numbers = line.says.removeprefix("keeps ").partition(" of")[0].split(", ")
        remaining = remaining[torch.tensor([int(n) for n in numbers])]
    assert len(remaining) == 2
    (layer,) = layers_of(original)
    ids = layer.route.outputs[1]
    before, after = (
        evaluate(replace(p.graph, outputs=(ids,)), [tokens()], p.weights)[0]
        for p in (original, steps[-1].program)
    )
    same = (before.sort(-1).values == remaining[after].sort(-1).values).all(-1)
    assert 0 < same.double().mean() < 1
    assert steps[-1].damage is not None
    assert steps[-1].damage.after.changed == pytest.approx(1 - float(same.double().mean()))


def test_strict_fails_on_a_breach() -> None:
    assert BudgetError.exit_code == 4
    with pytest.raises(BudgetError) as raised:
        change(program(), HALF, limit="error<=1e-6", strict=True)
    assert "prune-experts(keep=0.5,by=usage,seed=0,scope=layer) at layers.0: error is" in str(
        raised.value
    )
    assert "leave out --strict" in str(raised.value)


def test_wrong_code_fails_whatever_the_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Executor.__call__

    def wrong(self: Executor, inputs: Any) -> Any:
        return {name: value * 1.001 for name, value in right(self, inputs).items()}

    monkeypatch.setattr(Executor, "__call__", wrong)
    with pytest.raises(VerificationError, match="the generated code is wrong"):
        moec.compile(Moe(), (x,), passes=[HALF], calib=data)


@pytest.mark.parametrize("name", ["fuse-gate", "split-packed"])
def test_a_wrong_exact_pass_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One after the change, and one before it: the original is checked too."""
    kind: Any = {"fuse-gate": FuseGate, "split-packed": SplitPacked}[name]
    right = kind.run

    def wrong(self: Any, program: Program, log: Log) -> Program:
        result = right(self, program, log)
        ops = tuple(
            replace(op, attrs={**op.attrs, "scale": 1.2})
            if op.name in ("moe.gate", "moe.route")
            else op
            for op in result.graph.ops
        )
        return replace(result, graph=replace(result.graph, ops=ops))

    monkeypatch.setattr(kind, "run", wrong)
    with pytest.raises(VerificationError, match=f"the graph differs is {name}"):
        moec.compile(Moe(), (x,), passes=[HALF], calib=data)


def test_changed_tokens() -> None:
    original = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 0]])
    assert changed_share(original, original, ((0,), (1,), (2,), (3,))) == 0
    assert changed_share(original, original.flip(1), ((0,), (1,), (2,), (3,))) == 0
    assert changed_share(original, torch.tensor([[0, 1]] * 4), ((0,), (1,))) == 0.5
    assert changed_share(original, original, ((0,), (1,), (2, 3), ())) == 0.5
    assert changed_share(original, original[:, :1], ((0,), (1,), (2,), (3,))) == 1


def test_a_model_that_looks_ahead_is_no_language_model() -> None:
    changed = program(1)
    graph = parse("""
    graph main(ids: i64[B, S]; embed: f32[20, 8]) {
      size B in [1, inf]
      size S in [1, 64]
      e: f32[B, S, 8] = aten.embedding.default(embed, ids)
      m: f32[B, 1, 8] = aten.mean.dim(e) <dim=(1), keepdim=true>
      s: f32[B, S, 8] = aten.add.Tensor(e, m)
      scores: f32[B, S, 20] = aten.linear.default(s, embed)
      return scores
    }""")
    ahead = Program(graph, {"embed": changed.weights["embed"]})
    for inputs, expected in ((changed, (0, 0)), (ahead, None)):
        assert Evaluator(inputs, load_calibration({"ids": tokens()}, inputs, {})).text == expected


@pytest.mark.parametrize(
    ("calib", "says"),
    [
        ({"y": torch.zeros(64, 2)}, "calib holds y, and the model takes ids: i64[B, S]"),
        ({"ids": torch.zeros(4, 16)}, "ids is torch.float32, the model takes i64"),
        ({"ids": torch.zeros(64, dtype=torch.int64)}, "ids is not i64[B, S]: rank 1"),
        ({"ids": torch.full((4, 16), 20)}, "from 20 to 20, and the model takes ids from 0 to 19"),
        ({"ids": torch.zeros(0, 16, dtype=torch.int64)}, "ids is empty"),
        (
            {"ids": tokens(16)},
            ("hold 16 tokens, too few to distinguish the 4 experts of layers.0"),
        ),
        ({"ids": tokens(1024).reshape(8, 128)}, "size S is 128, the model takes 1 to 64"),
        ({"ids": np.array(["a"])}, "ids is no array of numbers"),
    ],
)
def test_data_that_do_not_fit(calib: Any, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        change(program(), HALF, calib=calib)
    assert says in str(raised.value)


def test_a_model_without_floats_is_refused() -> None:
    original = program(1)
    text = print_graph(original.graph).replace(
        "  return scores",
        "  best: i64[B, S] = aten.argmax.default(scores) <dim=-1>\n  return best",
    )
    with pytest.raises(UsageError, match="are integers: no distance can be measured"):
        change(Program(parse(text), original.weights), HALF)


def test_data_from_files(tmp_path: Path) -> None:
    ids = tokens().numpy()
    np.savez(tmp_path / "ids.npz", ids=ids.astype(np.int32))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    changed = [
        change(program(), HALF, calib=calib)[-1].damage
        for calib in (tmp_path / "ids.npz", str(tmp_path / "ids.safetensors"), {"ids": ids})
    ]
    assert changed[0] == changed[1] == changed[2]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        change(program(), HALF, calib=tmp_path / "a.txt")


def test_text(tiny_moe: Path, tmp_path: Path) -> None:
    """Windows of a text, with the checkpoint's tokenizer."""
    files = {"tokenizer/tokenizer.json": (tiny_moe / "tokenizer.json").read_bytes()}
    captured = Program(parse("""
    graph main(input_ids: i64[B, S]; embed: f32[1024, 8]) {
      size B in [1, inf]
      size S in [1, 512]
      e: f32[B, S, 8] = aten.embedding.default(embed, input_ids)
      return e
    }"""), {"embed": torch.zeros(1024, 8)})  # fmt: skip
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 300)
    data = load_calibration(tmp_path / "a.txt", captured, files)
    assert {tuple(t.shape[1:]) for case in data.cases for t in case} == {(256,)}
    assert data.tokens % 256 == 0
    assert 256 < data.tokens <= 16 * 256
    (tmp_path / "b.txt").write_text("def")
    with pytest.raises(UsageError, match="one window needs 256; give more"):
        load_calibration(tmp_path / "b.txt", captured, files)


def test_calibration_data_of_several_domains(tmp_path: Path) -> None:
    """No case mixes domains, and lengths may differ from one to the next."""
    program = Program(parse("""
    graph main(x: f32[T, S, 8]) {
      size T in [1, 4]
      size S in [1, 512]
      y: f32[T, S, 8] = aten.neg.default(x)
      return y
    }"""), {})  # fmt: skip
    x = {"a": {"x": torch.randn(6, 100, 8)}, "b": {"x": torch.randn(2, 50, 8)}}
    result = load_calibration(x, program, {})
    assert result.domains == ("a", "a", "b")
    assert [tuple(case[0].shape) for case in result.cases] == [(4, 100, 8), (2, 100, 8), (2, 50, 8)]
    assert result.tokens == 700
    for name, data in x.items():
        np.savez(tmp_path / f"{name}.npz", x=data["x"].numpy())
    text = ",".join(f"{name}={tmp_path}/{name}.npz" for name in x)
    again = load_calibration(text, program, {})
    assert again.domains == result.domains
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again.cases, result.cases, strict=True))
    assert load_calibration({"x": x["a"]["x"]}, program, {}).domains == ()
    (tmp_path / "x=1.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    assert load_calibration(f"{tmp_path}/x=1.npz", program, {}).domains == ()
    with pytest.raises(UsageError, match=r"calib\['b'\] holds y, and the model takes x"):
        load_calibration({**x, "b": {"y": torch.zeros(1, 1, 8)}}, program, {})


def compile_with(**options: Any) -> Any:
    return moec.compile(Moe(), (x,), build=False, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"passes": [HALF]}, "prune-experts needs calibration data: give --calib"),
        ({"passes": "+prune-experts(keep=0.5)"}, "needs calibration data"),
        ({"passes": [HALF], "calib": 3}, "calib is a int: give the path of a file, or tensors"),
        ({"passes": [HALF], "calib": "a.csv"}, (
            "must be a file of type .npz, .safetensors, .txt"
        )),
        ({"passes": [HALF], "calib": "no.npz"}, "--calib no.npz: there is no such file"),
        ({"passes": [HALF], "calib": "a=b.npz,c"}, "--calib a=b.npz,c: write NAME=FILE,NAME=FILE"),
        ({"passes": [HALF], "calib": "a=x.npz,a=y.npz"}, "with a different name for each domain"),
        ({"passes": [HALF], "calib": "a=no.npz"}, "--calib a=no.npz: there is no such file"),
        ({"passes": [HALF], "calib": {"a": data, "b": 3}}, "calib['b'] is a int: give the path"),
        ({"passes": [HALF], "calib": data, "budget": "kl<1"}, "write METRIC<=NUMBER"),
        ({"passes": [HALF], "calib": data, "budget": "loss<=1"}, "one of kl, perplexity, error"),
        ({"passes": [HALF], "calib": data, "budget": "kl<=-1"}, "write METRIC<=NUMBER"),
        ({"passes": [HALF], "calib": data, "budget": "kl<=1,kl<=2"}, "kl has two limits"),
        ({"passes": [HALF], "calib": data, "budget": "kl<=1"}, "causal language model, which"),
        ({"passes": [HALF], "calib": data, "strict": True}, "give --budget too"),
        ({"calib": data}, (
            "--calib is for passes that change the model and for --quant, and neither"
        )),
        ({"budget": "kl<=1"}, "--budget limits passes that change the model"),
        ({"passes": [3]}, "passes holds a int: give text or passes"),
        ({"passes": "+prune"}, "where name is one of canonicalise, "),
        ({"passes": "-prune-experts"}, "prune-experts is off by default: leave it out"),
        ({"passes": "+prune-experts(kep=1)"}, "did you mean 'keep'? prune-experts takes keep"),
        ({"passes": "+prune-experts(keep)"}, "write keep as option=value; prune-experts takes"),
        ({"passes": "+prune-experts(keep=a)"}, "keep is 'a', expected a number from 0 to 1"),
        ({"passes": "+prune-experts(keep=2)"}, "keep is 2.0, expected a number from 0 to 1"),
        ({"passes": "+prune-experts(keep=1,keep=1)"}, "keep is given twice"),
        ({"passes": "+prune-experts(by=size)"}, "expected one of usage, reap, error, random"),
        ({"passes": "+prune-experts(keep=1"}, "a parenthesis is unbalanced"),
        ({"passes": "+prune-experts(keep=1)x"}, "the list ends with )"),
        ({"passes": "+fuse-gate(a=1)"}, "fuse-gate has no options"),
        ({"passes": "+compress-experts(kind=2bit)"}, "compress-experts takes by, damping"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MoecError) as raised:
        compile_with(**options)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_spelling() -> None:
    assert split("+a(b=1,c=2), -d,,+e") == ["+a(b=1,c=2)", "-d", "+e"]
    spelled = choose(2, "+prune-experts(keep=0.25, by=reap),-fuse-gate")
    assert PruneExperts(keep=0.25, by="reap") in spelled
    names = [p.name for p in choose(2, ["+prune-experts()", HALF])]
    at = names.index("prune-experts")
    around = ["share-experts", "prune-experts", "prune-experts", "join-calls"]
    assert names[at - 1 : at + 3] == around
    assert not any(p.name == "prune-experts" for p in choose(2))


def test_budgets() -> None:
    assert parse_budget("kl <= 0.02, error<=1e-1") == Budget((("kl", 0.02), ("error", 0.1)))
    assert str(parse_budget("kl<=0.02,changed<=0.5")) == "kl<=0.02,changed<=0.5"
    far = Distance(error=float("nan"), changed=0.5, kl=0.02)
    assert parse_budget("kl<=0.02,changed<=0.5").breach(far) == ""
    assert parse_budget("kl<=0.0199").breach(far) == "kl is 0.02, the budget is kl<=0.0199"
    assert parse_budget("error<=10").breach(far).startswith("error is nan")


def test_damage_as_a_dict() -> None:
    damage = change(program(), HALF)[-1].damage
    assert damage is not None
    assert msgspec.convert(asdict(damage), Damage) == damage
