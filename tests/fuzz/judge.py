"""Compares moec's results for a layer with eager, at sizes below and above capacities."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib.util
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import moec
from moec.capture import Captured, capture
from moec.errors import InputError, IRError, MoecError
from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.interpret.run_in_float32 import (
    all_in_float32,
    eager_in_float32,
    in_float32,
    wide,
)
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.ir.sizes.dims import bind_shape, show_bounds
from moec.ir.sizes.thresholds import violated
from moec.model.compiled import CompiledModel
from moec.oracle.rounding import FLOAT32_UNIT, NOISE, UNIT, errors_of_rows, rows_beyond
from moec.oracle.tolerance import TOLERANCES, distance
from tests.fuzz.layer import Layer, source
from tests.fuzz.second_inputs import SECOND_INPUTS, Draw

EXAMPLE = (2, 6)
SIZES = (EXAMPLE, (1, 1), (1, 2), (2, 1), (3, 7), (1, 40), (5, 31), (8, 90))
SHORT = {"float16": "f16", "bfloat16": "bf16"}
"""Types of 16 bits, and moec's names for them."""
DRAWS = ("normal", "alike", "wide", "padded")


Form = Callable[[Graph], Graph]
"""Another graph that computes the same."""


class Outcome(enum.StrEnum):
    """`EAGER` is a defect of the fuzzer: the layer does not run."""

    BLOCKS = "equal, with blocks"
    DENSE = "equal, without blocks"
    REFUSED = "refused"
    WRONG = "wrong"
    CRASH = "crash"
    EAGER = "eager fails"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came out, and more of it in words: a reason, a trace, where the numbers differ."""

    outcome: Outcome
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `eager` answers to a call; `run` answers it as well, in float32 if `widened`, with that
    relative noise and seed."""

    words: str
    inputs: tuple[torch.Tensor, ...]
    eager: Any
    run: Callable[..., Any]

    def tied(self, widened: bool = False) -> Any:
        """The answer that prefers the first of equal scores."""
        with FirstOfEquals():
            return self.run(widened)


def judge(
    layer: Layer, name: str, folder: Path, built: bool = False, form: Form | None = None
) -> Verdict:
    """Compiles the layer from a file of its own, or a form of its graph, which has no other sides.
    `built` also makes and runs machine code, else the graph after all passes is interpreted, in 16
    bits in float32 as the layer then is, so that rounding excuses nothing."""
    widened = layer.dtype in SHORT and not built
    try:
        module, example = load(layer, name, folder), draw("normal", layer.example, EXAMPLE, layer)
        answers = list(_answers(module, layer, widened))
        assert answers
    except Exception:
        return Verdict(Outcome.EAGER, traceback.format_exc())
    try:
        target = "cpu" if built else "null"
        if form is not None:
            compiled = _compiled_form(capture(module, example), form)
            within = compiled.captured.program
            answers = [answer for answer in answers if not _refusal(within, answer.inputs)]
        else:
            compiled = moec.compile(module, example, target=target, kv_cache=built, verify=built)
        run = compiled if built else interpreted(compiled, widened)
        if widened:
            folded = interpreted(compiled, folded=True)
            wrong, refused = compare(run, answers, "float32", folded)
        else:
            wrong, refused = compare(run, answers, layer.dtype)
    except MoecError as error:
        return Verdict(Outcome.REFUSED, f"{type(error).__name__}: {error}")
    except Exception:
        return Verdict(Outcome.CRASH, traceback.format_exc())
    if wrong:
        words = f"{len(wrong)} of {len(answers)} calls, {len(refused)} refused"
        return Verdict(Outcome.WRONG, f"{wrong[0]} ({words})")
    if refused:
        return Verdict(Outcome.REFUSED, f"{refused[0]} ({len(refused)} of {len(answers)} calls)")
    reasons = "; ".join(d.reason for d in compiled.declined if not d.reason.startswith("router"))
    return Verdict(Outcome.BLOCKS if compiled.blocks else Outcome.DENSE, reasons)


def _compiled_form(captured: Captured, form: Form) -> CompiledModel:
    """A form of the first capture of which one compiles."""
    program = Program(form(captured.program.graph), captured.program.weights)
    example, signature = captured.example, captured.signature
    module = GraphModule(program, {}, (example, {}), captured.structure, signature=signature)
    try:
        return moec.compile(module, example, target="null", verify=False)
    except MoecError:
        if captured.other is None:
            raise
        return _compiled_form(captured.other(), form)


def load(layer: Layer, name: str, folder: Path) -> nn.Module:
    """The layer, in eval mode, of a module of its own: its lines are in `folder`/`name`.py."""
    path = folder / f"{name}.py"
    path.write_text(source(layer))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    sys.modules[name] = file
    spec.loader.exec_module(file)
    torch.manual_seed(0)
    module: nn.Module = file.Layer().eval().to(getattr(torch, layer.dtype))
    return module


def draw(kind: str, value: str, size: tuple[int, int], layer: Layer) -> tuple[torch.Tensor, ...]:
    """f[B, S, D]: random, all rows alike (one expert has them all), of large logits, or zeros
    behind some tokens (equal scores); and the value of the second input if the layer has one."""
    generator = torch.Generator().manual_seed(size[0] * 1000 + size[1])
    x = torch.randn(*size, layer.width, generator=generator)
    if kind == "alike":
        x = x[:1, :1].expand(*size, layer.width).contiguous()
    lengths = torch.randint(1, size[1] + 1, size[:1], generator=generator)
    lengths[0] = size[1]
    if kind == "padded":
        x = x * (torch.arange(size[1]) < lengths.clamp(max=max(1, size[1] - 2))[:, None])[..., None]
    dtype = getattr(torch, layer.dtype)
    x = (x * 8 if kind == "wide" else x).to(dtype)
    if not layer.second:
        return (x,)
    call = Draw(*size, layer.experts, dtype, generator)
    return x, SECOND_INPUTS[layer.second].values[value](call)


def calls(layer: Layer) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """A draw, a value of the second input and a size, of each call: at every size all draws and all
    values, together in other pairs than at the last. The first is the example's."""
    values = [layer.example]
    if layer.second:
        values += [v for v in SECOND_INPUTS[layer.second].values if v != layer.example]
    for turn, size in enumerate(SIZES):
        for index in range(max(len(DRAWS), len(values))):
            yield DRAWS[index % len(DRAWS)], values[(index + turn) % len(values)], size


def _answers(module: nn.Module, layer: Layer, widened: bool = False) -> Iterator[Answer]:
    """The answers of eager, in float32 if `widened`. It must run on the example; other calls at
    which it fails are skipped."""
    module = copy.deepcopy(module).float() if widened else copy.deepcopy(module)
    for number, (kind, value, size) in enumerate(calls(layer)):
        inputs = draw(kind, value, size, layer)
        inputs = tuple(map(wide, inputs)) if widened else inputs
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                eager = module(*(t.clone() for t in inputs))
        except Exception:
            if not number:
                raise
            continue
        words = " ".join(filter(None, (kind, value and f"({value})", f"{size[0]}x{size[1]}")))
        yield Answer(words, inputs, eager, partial(_run, module, inputs))


def _run(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    widened: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> Any:
    """What the module answers in eager, in float32 if `widened`."""
    run = eager_in_float32(module, noise, seed) if widened else module
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*(t.clone() for t in inputs))


def compare(
    run: Callable[..., Any],
    answers: Sequence[Answer],
    dtype: str,
    folded: Callable[..., Any] | None = None,
) -> tuple[list[str], list[str]]:
    """In words, the calls whose results are wrong, and those that are refused: what is refused at
    one size may be wrong at another. In 16 bits all calls are one sample. `folded` answers in
    float32 with the layer's constants computed in 16 bits: as far from eager may results be. So may
    they be in more bits where eager's own last bits decide, as of scores that are rounded: twice as
    far as eager with noise of these bits."""
    wrong, refused, compared = [], [], []
    for answer in answers:
        try:
            result = run(*answer.inputs)
        except MoecError as error:
            refused.append(f"{answer.words}: {type(error).__name__}: {error}")
            continue
        difference = _difference(result, [answer.eager], dtype)
        if difference and dtype not in SHORT:
            with FirstOfEquals():  # for ops of the graph that are eager's, as kernels choose
                result = run(*answer.inputs)
            difference = _difference(result, [answer.eager, answer.tied()], dtype)
        if difference and dtype not in SHORT:
            noise = 2 * torch.finfo(getattr(torch, dtype)).eps  # of sums of some hundred terms
            with FirstOfEquals():
                noisy = [answer.run(True, noise, seed) for seed in range(8)]
            more = _difference(result, [answer.tied(), *noisy], dtype, yardstick=True)
            difference = difference if more else ""
        wrong += [f"{answer.words}: {difference}"] if difference else []
        compared.append((answer, result))
    if dtype in SHORT and not wrong:
        excess = _excess(compared, UNIT[SHORT[dtype]])
        wrong += [excess] if excess else []
    if folded is not None and wrong and not _rounds_more(run, compared, folded):
        wrong = []
    return wrong, refused


def _rounds_more(
    run: Callable[..., Any], compared: Sequence[tuple[Answer, Any]], folded: Callable[..., Any]
) -> bool:
    """Whether results differ from eager, both in float32, by more than constants that are computed
    in 16 bits do, or in their shapes or types. Of equal scores all prefer the first."""
    answers = [answer for answer, _ in compared]
    exact = [_tensors(answer.tied()) for answer in answers]
    with FirstOfEquals():
        results = [_tensors(run(*answer.inputs)) for answer in answers]
        yardstick = [_tensors(folded(*answer.inputs)) for answer in answers]
    unlike = any(
        _unlike(actual, right)
        for ours, tensors in zip(results, exact, strict=True)
        for actual, right in zip(ours, tensors, strict=True)
    )
    beyond = None if unlike else rows_beyond(results, exact, FLOAT32_UNIT)
    return unlike or (beyond is not None and beyond.explained_by(yardstick) is not None)


def _excess(compared: Sequence[tuple[Answer, Any]], unit: float) -> str:
    """How rows are further from eager in float32 than eager in 16 bits; "" where none is."""
    words = ""
    for answer, result in compared:
        ours, exact = _tensors(result), _tensors(answer.run(True))
        eager = errors_of_rows([_tensors(answer.eager)], [exact], False)
        limits = [max(unit, 3 * float(e.quantile(0.9)) if len(e) else 0.0) for e in eager]
        beyond = rows_beyond([ours], [exact], limits, False)
        noisy = (_tensors(answer.run(True, unit * NOISE, seed)) for seed in range(32))
        # What is right in 16 bits is also rounded at its end.
        others = ([t.to(r.dtype) for t, r in zip(n, ours, strict=False)] for n in noisy)
        right = (_tensors(other) for other in (answer.eager, answer.tied(True), answer.tied()))
        for other in (*right, *(others if beyond else ())):
            beyond = beyond and beyond.explained_by([other])
        words = words or (str(beyond) if beyond else "")
    return words


def interpreted(
    compiled: CompiledModel, widened: bool = False, folded: bool = False
) -> Callable[..., Any]:
    """Runs the graph after all passes, or the first of its sides that takes the inputs, in float32
    if `widened`; or if `folded` the captured graph in float32, what depends on weights alone in the
    layer's dtype. Raises InputError for sizes that no graph has."""

    def run(*inputs: torch.Tensor) -> Any:
        refusals = []
        for form in (compiled, *compiled.sides):
            program = form.captured.program if folded else form.pass_results[-1].program
            if refusal := _refusal(program, inputs):
                refusals.append(refusal)
                continue
            if folded:
                (results,) = all_in_float32(program, [inputs], folded=True)
            elif widened:
                results = in_float32(program)(inputs)
            else:
                results = evaluate(program.graph, inputs, program.weights)
            return form.captured.structure.rebuild(results)
        raise InputError("; and ".join(refusals))

    return run


def _refusal(program: Program, inputs: Sequence[torch.Tensor]) -> str:
    """Which sizes of the inputs are not the graph's, "" where all are."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(program.graph.inputs, inputs, strict=True):
        try:
            bind_shape(value.shape, tuple(tensor.shape), sizes)
        except IRError as error:
            return f"{value.name}: {error}"
    size = violated(program.graph.bounds, sizes)
    return f"{size} is outside of {show_bounds(program.graph.bounds[size])}" if size else ""


def _difference(actual: Any, right: list[Any], dtype: str, yardstick: bool = False) -> str:
    """In words, how an output differs from all that are right; "" where none does. With a
    `yardstick`, from the first of them, by more than twice what the others do."""
    ours = _leaves(actual)
    answers = [_leaves(answer) for answer in right]
    if len(ours) != len(answers[0]):
        return f"{len(ours)} outputs, and eager has {len(answers[0])}"
    for number, (a, *equals) in enumerate(zip(ours, *answers, strict=True)):
        if not isinstance(a, torch.Tensor):
            if a != equals[0]:
                return f"output {number} is {a!r}, and eager's {equals[0]!r}"
            continue
        words = _unlike(a, equals[0]) if dtype in SHORT else _apart(a, equals, dtype, yardstick)
        if words:
            return f"output {number} {words}"
    return ""


def _leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [
        part
        for leaf in pytree.tree_leaves(value, is_leaf=dataclasses.is_dataclass)
        for part in (_leaves(leaf) if dataclasses.is_dataclass(leaf) else [leaf])
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _apart(
    actual: torch.Tensor, answers: Sequence[torch.Tensor], dtype: str, yardstick: bool
) -> str:
    """In words, how a tensor differs from each of the answers, or from the first by more than twice
    what the others do."""
    limit = TOLERANCES["f64" if dtype == "float64" else "f32"]
    if yardstick:
        first, *noisy = answers
        limit, answers = max(limit, *(2 * distance(other, first) for other in noisy)), [first]
    unlike = _unlike(actual, answers[0])
    errors = [] if unlike else [distance(actual, expected) for expected in answers]
    return unlike or (f"differs by {errors[0]:.1e}" if min(errors) > limit else "")


def _unlike(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """In words, how shapes or types differ."""
    if actual.shape == expected.shape and actual.dtype == expected.dtype:
        return ""
    shapes = list(actual.shape), list(expected.shape)
    return f"is {actual.dtype}{shapes[0]}, and eager's {expected.dtype}{shapes[1]}"


def in_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moec-fuzz-")
