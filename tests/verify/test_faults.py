"""Faults planted below the judge, in what it reads: each is refused, and not the model without.

The model is random, in bfloat16, with 64 experts of which each token takes 4: what one expert does
is in one row of 16, and a wrong row is within the error of eager's own roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import moec
from moec.errors import VerificationError
from moec.ir.graph import Graph, Op, Program, TensorType, Value
from moec.model.build import verify_model
from moec.model.clock import Clock
from moec.model.compiled import CompiledModel
from moec.passes.decode import logits_of
from moec.runtime.device.timed import open_watched
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE
from moec.verify import recording
from moec.verify.check import check
from moec.verify.code import check_code
from moec.verify.texts import InterpretedDecoder, check_texts, pieces_of
from tests.capture import modules
from tests.models.families import FAMILIES

EXPERTS = 64
ONE = 37
"""An expert of the last layer."""
Edit = Callable[[Array], Array | None]


@pytest.fixture(scope="module", params=(torch.bfloat16, torch.float16, torch.float32), ids=str)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=160,
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(request.param).eval()
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim("S", max=600)},)
    tokens = (torch.randint(0, 160, (2, 9)),)
    return moec.compile(model, tokens, dynamic_shapes=sizes, verify=False)


def as_floats(array: Array) -> Array:
    """The elements of packed weights: pairs of bf16 are in one integer."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.int32 else array


def times(factor: float, *experts: int) -> Edit:
    def edit(array: Array) -> Array:
        changed = array.copy()
        values = as_floats(changed)
        part = (list(experts) or slice(None),)
        values[part] = (values[part].astype(np.float32) * factor).astype(values.dtype)
        return changed

    return edit


def swapped(array: Array) -> Array:
    changed = array.copy()
    changed[[3, 5]] = array[[5, 3]]
    return changed


def with_nan(array: Array) -> Array:
    changed = array.copy()
    as_floats(changed).reshape(-1)[5] = np.nan
    return changed


FAULTS: Mapping[str, tuple[str, Edit]] = {
    "two experts swapped, all matrices": ("layers.1.mlp.experts", swapped),
    "two experts swapped, one matrix": ("layers.1.mlp.experts.down_proj", swapped),
    "an expert times 1.5": ("layers.1.mlp.experts.down_proj", times(1.5, ONE)),
    "an expert times 1.1": ("layers.1.mlp.experts.down_proj", times(1.1, ONE)),
    "an expert times 1.02": ("layers.1.mlp.experts.down_proj", times(1.02, ONE)),
    "gate and up of an expert times 1.02": ("layers.1.mlp.experts.gate_up", times(1.02, ONE)),
    "an expert negated": ("layers.0.mlp.experts.down_proj", times(-1, 0)),
    "the last expert never chosen": ("layers.1.mlp.gate.weight", times(0, EXPERTS - 1)),
    "a norm times 1.01": ("layers.1.input_layernorm", times(1.01)),
    "the head times 1.01": ("lm_head", times(1.01)),
    "keys times 1.01": ("layers.0.self_attn.k_proj", times(1.01)),
    "NaN in the weight of one expert": ("layers.1.mlp.experts.down_proj", with_nan),
    "NaN in the table of tokens": ("embed_tokens", lambda a: times(np.nan, *range(160))(a)),
}


def faulty(compiled: CompiledModel, name: str, edit: Edit) -> Any:
    package, _ = compiled.ready()
    arrays = dict(package.arrays)
    edited = {key: edit(array) for key, array in arrays.items() if name in key}
    assert edited
    return replace(package, arrays={**arrays, **edited})


def test_the_code_is_right(compiled: CompiledModel) -> None:
    package, _ = compiled.ready()
    checked = check_code(package, compiled.module, compiled.captured, [compiled.captured.example])
    assert checked.wrong is None
    assert checked.worst <= 1
    assert checked.least_rows is not None
    assert checked.least_rows >= 20


def test_most_calls_copy_little(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call of a function, what its comparison reads."""
    calls: list[recording.KernelRecord] = []
    monkeypatch.setattr(recording.Recording, "take", lambda self: calls.extend(self.calls) or calls)
    check_code(compiled.ready()[0], compiled.module, compiled.captured, [compiled.captured.example])
    first, *later = (call for call in calls if call.function == DECODE and not call.complete)
    assert all(first.inputs.keys() > call.inputs.keys() for call in later)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_weights_is_found(compiled: CompiledModel, fault: str) -> None:
    package = faulty(compiled, *FAULTS[fault])
    with pytest.raises(VerificationError, match=r"computes .* wrong"):
        check_code(package, compiled.module, compiled.captured, [compiled.captured.example])


def run_of(compiled: CompiledModel, change: Callable[[torch.Tensor], object] = id) -> Any:
    _, executor = compiled.ready()

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        executor.reset()
        results = {name: torch.as_tensor(value) for name, value in executor(inputs).items()}
        for value in results.values():
            change(value)
        return results

    return run


def test_nan_in_the_last_token_of_each_text_is_found(compiled: CompiledModel) -> None:
    def change(logits: torch.Tensor) -> None:
        logits[:, -1:] = torch.nan

    with pytest.raises(VerificationError, match=r"NaN or infinities|differs from eager"):
        check(compiled.captured, run_of(compiled, change), compiled.pass_results)


# ---- texts in pieces -------------------------------------------------------------------


def compare_pieces(compiled: CompiledModel, program: Program) -> str:
    names = [value.name for value in compiled.captured.program.graph.outputs]
    output = names.index(logits_of(compiled.graph).name)
    package, _ = compiled.ready()
    decoder = InterpretedDecoder(package, program)
    return check_texts(compiled.captured, decoder, output, pieces_of(package, weights=1))


def shifted(program: Program, reader: str, above: int) -> Program:
    """The program in which the ops of this name get positions that are one too low from `above`."""
    graph = program.graph
    (first,) = (value for value in graph.inputs if value.name == "first")
    late = Value("late", TensorType("bool", first.shape))
    number = Value("late_number", first.type)
    low = Value("low", first.type)
    before = [
        Op("aten.ge.Scalar", (first,), (late,), {"other": above}),
        Op("aten.mul.Tensor", (first, late), (number,)),
        Op("aten.clamp.default", (number,), (Value("one", first.type),), {"min": 0, "max": 1}),
    ]
    one = before[-1].outputs[0]
    before.append(Op("aten.sub.Tensor", (first, one), (low,)))
    ops = [
        replace(op, inputs=tuple(low if v is first else v for v in op.inputs))
        if op.name.startswith(reader)
        else op
        for op in graph.ops
    ]
    return replace(program, graph=replace(graph, ops=(*before, *ops)))


def test_texts_in_pieces_are_right(compiled: CompiledModel) -> None:
    assert "to token 600" in compare_pieces(compiled, compiled.module[DECODE])


def test_texts_hold_no_padding() -> None:
    """Its row is zero, and so all scores of experts: which are chosen, torch leaves open."""
    family = FAMILIES["jetmoe"]
    fields = {**family.fields, "num_hidden_layers": 2, "initializer_range": 0.08}
    model = replace(family, fields=fields).build(torch.float32)
    padded = moec.compile(model, kwargs=family.inputs(2, 7), verify=False)
    assert compare_pieces(padded, padded.module[DECODE])


@pytest.mark.parametrize("above", [64, 128, 512, 598])
@pytest.mark.parametrize("reader", ["nn.append", "aten."])
def test_a_cache_or_a_position_one_too_low_beyond_some_tokens_is_found(
    compiled: CompiledModel, reader: str, above: int
) -> None:
    program = shifted(compiled.module[DECODE], reader, above)
    with pytest.raises(VerificationError, match="in pieces, the logits after"):
        compare_pieces(compiled, program)


def without(graph: Graph, name: str) -> Graph:
    """The graph whose last op of this name gives its first operand."""
    (*_, op) = (op for op in graph.ops if op.name == name)
    (out,) = op.outputs
    same = Op("aten.alias.default", op.inputs[:1], (out,))
    return replace(graph, ops=tuple(same if each is op else each for each in graph.ops))


def test_keys_that_are_not_turned_are_found(compiled: CompiledModel) -> None:
    program = compiled.module[DECODE]
    wrong = replace(program, graph=without(program.graph, "nn.rotary"))
    with pytest.raises(VerificationError, match="in pieces"):
        compare_pieces(compiled, wrong)


# ---- kernels that are wrong at one of the sizes ----------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], object]) -> None:
    """From now on `change` gets the tensors of each call of such kernels after it."""

    def open_faulty(library: Any, functions: Any, watch: Any) -> Any:
        def faulty(kernel_name: str, kernel: Any, arguments: Any) -> Any:
            def run(*tensors: Any) -> Any:
                kernel(*tensors)
                if kernel_name.startswith(name):
                    change([torch.from_dlpack(tensor) for tensor in tensors])

            return watch(kernel_name, run, arguments)

        return open_watched(library, functions, faulty)

    monkeypatch.setattr(recording, "open_watched", open_faulty)


@pytest.mark.parametrize("position", [64, 127, 511, 599])
def test_attention_that_is_wrong_at_one_position_is_found(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    def change(tensors: Any) -> None:
        *_, first, out = tensors
        if out.shape[1] == 1:  # a step, and not `main`
            out[first == position] *= 1.02

    plant(monkeypatch, "attention", change)
    package, _ = compiled.ready()
    with pytest.raises(VerificationError, match=r"kernel attention.* wrong"):
        check_code(package, compiled.module, compiled.captured, [compiled.captured.example])


def choose_wrong(monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[int, int], bool]) -> set[int]:
    """From now on routers choose the next experts where `is_wrong` of the tokens of a call, and of
    the most tokens that one had before. Returns the tokens of all calls from now on."""
    counts = set[int]()

    def change(tensors: Any) -> None:
        chosen = tensors[-1]
        if is_wrong(len(chosen), max(counts, default=0)):
            chosen.copy_((chosen + 1) % EXPERTS)
        counts.add(len(chosen))

    plant(monkeypatch, "gate", change)
    return counts


def test_a_router_that_is_wrong_at_one_size_is_found(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of tokens with which verification calls it, and steps of two texts after 64."""
    sizes = choose_wrong(monkeypatch, lambda tokens, most: False)
    verify_model(compiled, None, Clock(str))
    assert len(sizes) > 5
    for size in sizes:
        faulty = choose_wrong(monkeypatch, lambda tokens, most, size=size: tokens == size)
        with pytest.raises(VerificationError, match=r"computes experts\w* .*wrong|differs from"):
            verify_model(compiled, None, Clock(str))
        assert size in faulty
    choose_wrong(monkeypatch, lambda tokens, most: tokens == 2 and most >= 360)
    with pytest.raises(VerificationError, match=r"computes experts\w* .*wrong"):
        verify_model(compiled, None, Clock(str))


# ---- layers before a router ------------------------------------------------------------

HIDDEN = 48


def one_hot(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores).scatter(-1, ids, 1.0)


def of_the_best_pair(scores: torch.Tensor) -> torch.Tensor:
    pairs = scores.sigmoid().unflatten(-1, (2, 2))
    best = one_hot(pairs[..., 0], pairs.sum(-1).topk(1).indices)
    return one_hot(scores, (pairs * best[..., None]).flatten(-2).topk(1).indices)


ROUTERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the best": lambda scores: one_hot(scores, scores.topk(1).indices),
    "the greatest": lambda scores: one_hot(scores, scores.argmax(-1, keepdim=True)),
    "of the best pair": of_the_best_pair,
    "two": lambda scores: one_hot(scores, scores.topk(2).indices) * scores.softmax(-1),
    "all": lambda scores: one_hot(scores, scores.topk(4).indices) * scores.softmax(-1),
    "above a threshold": lambda scores: (scores.sigmoid() > 0.5).to(scores.dtype),
}


class Routed(modules.Moe):
    def __init__(self, router: str) -> None:
        super().__init__(torch.bfloat16)
        layers = nn.Linear(modules.WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, modules.EXPERTS)
        self.scores, self.router = nn.Sequential(*layers).bfloat16(), router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = ROUTERS[self.router](self.scores(x)).unbind(-1)
        pairs = zip(weights, self.experts, strict=True)
        return sum(weight[:, None] * expert(x.relu()) for weight, expert in pairs)


@pytest.mark.parametrize("router", ROUTERS)
def test_scores_that_are_wrong_at_one_size_are_found(
    monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    """The graph makes the choices of the code, whose scores are wrong, so that results agree."""
    example, sizes = torch.randn(18, modules.WIDTH).bfloat16(), set[int]()
    compiled = moec.compile(Routed(router).eval(), (example,), verify=False)

    def reverse(tensors: Any, *, size: int = 0) -> None:
        *_, out = tensors
        if out.shape[1:] == (HIDDEN,):
            sizes.add(len(out))
            out.copy_(out.flip(-1) if len(out) == size else out)

    plant(monkeypatch, "linear", reverse)
    verify_model(compiled, None, Clock(str))
    assert len(sizes) > 2
    for size in sizes - {0}:
        plant(monkeypatch, "linear", partial(reverse, size=size))
        with pytest.raises(VerificationError, match=r"computes linear .*wrong"):
            verify_model(compiled, None, Clock(str))
