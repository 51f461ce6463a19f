"""Whether every kernel is right on the inputs that it got.

A call of a compiled model is recorded (`moec.verify.recording`). What each kernel wrote is compared
with what its ops mean, evaluated in float32 (float64 where the model has it) from what earlier
kernels wrote: errors do not add up, and no choice of experts tips over. The bound of an element is
half a unit in the last place of its dtype, and what roundings within the kernel can do: the ops are
evaluated once more, with noise of the size of these roundings on each operand and each intermediate
result. NaN and infinities must be where the ops give them, or may be where they do in 16 bits: 1e-9
is 0 there, and 0 / 0 is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from moec.ir.aten import TORCH_DTYPES
from moec.ir.formats.integer import dequantised_once
from moec.ir.graph import DType, Graph, Op, Program, Value
from moec.ir.interpret.evaluate import run_op
from moec.ir.interpret.run_in_float32 import InFloat32, wide
from moec.ir.interpret.stable_topk import CHOOSING, FirstOfEquals
from moec.ir.opdef import inputs_of, integer
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS
from moec.ir.sizes.dims import bind_shape, evaluate_dim
from moec.ir.upcast import widen
from moec.verify.bounds import LEAST_ROW, ROUNDING, SIGMAS, Bound
from moec.verify.recording import KernelRecord

SUMS = {True: 2.0**-18, False: 2.0**-21}
"""The noise of operands, by whether the model has 16 bits: sums of 1,024 terms in float32 are off
by as much as their operands by this."""
SAMPLES = 128
"""How often choices among nearly equal values are drawn, where one differs."""
_ROUTER_DTYPES = ("compute", "logits", "score_dtype", "choice_dtype")
_UNSORTING = ("moe.", "aten.index_put", "aten.index_add", "aten.scatter")
"""Ops whose rows are those of tokens again."""
_CODES = dict.fromkeys(QUANTISED_OPS, 2.0**-12) | {"grouped.compressed": 2.0**-17}
"""The size of what a row's element does that rounds to another code, of 8 bits or of 16."""
_PRODUCTS = ("aten.linear", "aten.mm", "aten.bmm", "aten.addmm", "grouped.", "nn.")
_RANKING = ("moe.gate", "moe.route", "aten.topk.default", "aten.sort.default")
_NORMS = ("nn.rms_norm", "nn.add_norm", "nn.layer_norm")
"""Ops that may round once before the last time."""


@dataclass(frozen=True)
class WrongKernel:
    """The first kernel that is wrong: what it computes, and where."""

    kernel: str
    value: str
    line: str
    why: str

    def __str__(self) -> str:
        where = f" ({self.line})" if self.line else ""
        return f"kernel {self.kernel} computes {self.value}{where} wrong: {self.why}"


@dataclass(frozen=True)
class KernelsChecked:
    """Kernels that were compared, each with all its calls: the number of both, the greatest error
    relative to its bound, and the least number of rows that an expert had in a layer."""

    kernels: frozenset[str]
    calls: int
    worst: float
    least_rows: int | None
    wrong: WrongKernel | None = None

    def joined(self, other: KernelsChecked) -> KernelsChecked:
        rows = [n for n in (self.least_rows, other.least_rows) if n is not None]
        return KernelsChecked(
            self.kernels | other.kernels,
            self.calls + other.calls,
            max(self.worst, other.worst),
            max(rows, default=None),
            self.wrong or other.wrong,
        )


NOTHING = KernelsChecked(frozenset(), 0, 0.0, None)


def check_kernels(
    parts: ProgramParts, calls: Sequence[KernelRecord], *, only_choices: bool = False
) -> KernelsChecked:
    """Compare what the kernels of one function wrote in these calls with its program: everything in
    whole ones, in others what chooses and each kernel in one place, or `only_choices`."""
    sizes = [parts.sizes_of(call) for call in calls]
    compared = [parts.choosing] * len(calls)
    if not only_choices:
        compared = [
            parts.recorded if call.complete else _some_values(call, number) | parts.choosing
            for number, call in enumerate(calls)
        ]
    checked = NOTHING
    for op in parts.graph.ops:
        names = {value.name for value in op.outputs}
        chosen = [n for n, values in enumerate(compared) if not values.isdisjoint(names)]
        part = parts.before(op) if chosen else ()
        weights = parts.weights_of(part)
        with dequantised_once():
            for n in chosen:
                checked = checked.joined(_check_part(parts, part, weights, calls[n], sizes[n]))
                if checked.wrong:
                    return checked
    return checked


def _some_values(call: KernelRecord, number: int) -> frozenset[str]:
    """What each kernel writes in one of its places, which is another in each call."""
    sites: dict[str, list[str]] = {}
    for value, kernel in call.kernels.items():
        sites.setdefault(kernel, []).append(value)
    return frozenset(values[number % len(values)] for values in sites.values())


@dataclass(frozen=True)
class ProgramParts:
    """A program in parts: the ops between values that kernels write, `recorded` by name."""

    program: Program
    recorded: frozenset[str]

    @cached_property
    def source(self) -> Graph:
        graph = self.program.graph
        return replace(graph, outputs=graph.results, states=())

    @cached_property
    def graph(self) -> Graph:
        """The source in float32."""
        return widen(self.source)

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """Of each value of the source."""
        return {value.name: value.dtype for value in self.source.values()}

    @cached_property
    def is_low(self) -> bool:
        return not {"bf16", "f16"}.isdisjoint(self.dtypes.values())

    @cached_property
    def choosing(self) -> frozenset[str]:
        """The results of ops that make integers, and the scores from which they are chosen. They
        are compared in every call: of what follows a wrong choice, all may agree with it."""
        results: set[str] = set()
        scores: dict[Value, None] = {}
        for op in self.graph.ops:
            if all(value.dtype[0] in "fbc" and value.dtype != "bool" for value in op.outputs):
                continue
            results |= {value.name for value in op.outputs}
            if op.name != "moe.gate":  # it has the product of the scores in it
                scores |= dict.fromkeys(v for v in op.inputs if v.dtype in ROUNDING)
        queue = [value for value in scores if value.shape]
        while queue:
            value = queue.pop()
            results.add(value.name)
            producer = self.graph.producers.get(value)
            for read in producer.inputs if producer is not None else ():
                if read.shape[-1:] == value.shape[-1:] and read not in scores:
                    scores[read] = None
                    queue.append(read)
        return frozenset(results & self.recorded)

    @cached_property
    def ends_of(self) -> Mapping[Value, Value]:
        """Of values with a row for each sorted choice: the ends of the rows of each expert."""
        ends: dict[Value, Value] = {}
        sorts: dict[Value, Value] = {}  # by the choices: one kernel sorts for all
        for op in self.graph.ops:
            if op.name in ("moe.sort", "moe.dispatch"):
                experts = op.inputs[op.name == "moe.dispatch"]
                if op.outputs[2].name in self.recorded:
                    sorts.setdefault(experts, op.outputs[2])
                sorted_rows = op.outputs[:1] if op.name == "moe.sort" else op.outputs[:2]
                ends |= dict.fromkeys(sorted_rows, sorts.get(experts, op.outputs[2]))
            elif op.name.startswith("grouped."):
                of_op = inputs_of(op).get("ends")
                ends |= dict.fromkeys(op.outputs, of_op) if of_op is not None else {}
            elif not op.name.startswith(_UNSORTING):
                rows = [v for v in op.inputs if v in ends]
                alike = [v for v in op.outputs if rows and v.shape[:1] == rows[0].shape[:1]]
                ends |= dict.fromkeys(alike, ends[rows[0]]) if alike else {}
        return ends

    def before(self, end: Op) -> tuple[Op, ...]:
        """The ops that lead from recorded values, inputs and weights to `end`, itself last."""
        ops, leading = [end], {id(end): end}
        while ops:
            for value in ops.pop().inputs:
                producer = self.graph.producers.get(value)
                if producer is None or value.name in self.recorded or id(producer) in leading:
                    continue
                leading[id(producer)] = producer
                ops.append(producer)
        return tuple(op for op in self.graph.ops if id(op) in leading)

    def needed(self, call: KernelRecord, number: int) -> frozenset[str]:
        """The inputs and results of a call that is not complete which its comparison reads; `call`
        is another of the function, and `number` calls came before."""
        compared = _some_values(call, number) | self.choosing
        read: set[Value] = set()
        for op in self.graph.ops:
            if op.name == "moec.size" or not compared.isdisjoint(v.name for v in op.outputs):
                read |= {v for each in self.before(op) for v in (*each.inputs, *each.outputs)}
        return frozenset(v.name for v in read | {self.ends_of[v] for v in read & {*self.ends_of}})

    def weights_of(self, part: Sequence[Op]) -> dict[Value, torch.Tensor]:
        params = set(self.graph.params)
        names = dict.fromkeys(value for op in part for value in op.inputs if value in params)
        return {value: wide(self.program.weights[value.name].detach()) for value in names}

    def sizes_of(self, call: KernelRecord) -> dict[str, int]:
        """The named sizes of a call."""
        sizes: dict[str, int] = {}
        for value in self.source.inputs:
            bind_shape(value.shape, call.shapes[value.name], sizes)
        for op in self.graph.ops:
            if op.name == "moec.size":
                part = self.before(op)
                read = self.operands(part, call, sizes)
                results = _run(part, {**self.weights_of(part), **read}, sizes)
                sizes[str(op.attrs["name"])] = int(results[0])
        return sizes

    def operands(
        self, part: Sequence[Op], call: KernelRecord, sizes: Mapping[str, int]
    ) -> dict[Value, torch.Tensor]:
        """The inputs and recorded values that a part reads, in float32."""
        inputs = set(self.graph.inputs)
        read = dict.fromkeys(value for op in part for value in op.inputs)
        computed = {value for op in part[:-1] for value in op.outputs}
        return {
            value: wide(
                call.inputs[value.name]
                if value in inputs
                else self._owned(
                    value, self.shaped(value, call.read_after(value.name), sizes), call
                )
            )
            for value in read
            if value in inputs or (value.name in self.recorded and value not in computed)
        }

    def _owned(self, value: Value, tensor: torch.Tensor, call: KernelRecord) -> torch.Tensor:
        """A result with 0 in the rows that no expert has, which a kernel leaves as they are."""
        rows = _owned_rows(self, value, call)
        if rows is None:
            return tensor
        return torch.cat([tensor[:rows], torch.zeros_like(tensor[rows:])])

    def shaped(self, value: Value, tensor: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        """What a kernel wrote, in the shape and the dtype of the graph's value."""
        dtype = TORCH_DTYPES[self.dtypes[value.name]]
        if dtype.is_complex and not tensor.is_complex():
            tensor = torch.view_as_complex(tensor)
        shape = [evaluate_dim(dim, sizes) for dim in value.shape]
        return tensor.reshape(shape).to(dtype)

    def run_as_is(
        self, part: Sequence[Op], values: Mapping[Value, torch.Tensor], sizes: Mapping[str, int]
    ) -> tuple[torch.Tensor, ...]:
        """The results of the last op of a part in the dtypes of the source."""
        ids = {id(op) for op in part}
        pairs = zip(self.source.ops, self.graph.ops, strict=True)
        narrow = {value.name: value for value in self.source.values()}
        named = {narrow[value.name]: tensor for value, tensor in values.items()}
        typed = {value: tensor.to(TORCH_DTYPES[value.dtype]) for value, tensor in named.items()}
        return _run([op for op, wide_op in pairs if id(wide_op) in ids], typed, dict(sizes))

    @cached_property
    def inner(self) -> Mapping[Value, float]:
        """The relative size of roundings within the op of each value, before the last one."""
        sums = SUMS[self.is_low]
        sizes: dict[Value, float] = {}
        for op, wide_op in zip(self.source.ops, self.graph.ops, strict=True):
            names = {value.dtype for value in op.body.values()} if op.body is not None else set()
            if op.name.startswith("moe."):
                attrs = [op.attrs.get(name) for name in _ROUTER_DTYPES]
                names |= {a.name if isinstance(a, DType) else str(a) for a in attrs}
            elif op.name.startswith("nn.") and op.name != "nn.quantised_linear":
                names |= {value.dtype for value in op.outputs}
            size = max((ROUNDING[name] / 2 for name in names & ROUNDING.keys()), default=sums)
            size = size * 2 / SIGMAS if op.name in _NORMS else size
            size *= 2 if op.name.startswith("moe.") else 1  # logits may round to one value
            sizes |= dict.fromkeys(wide_op.outputs, max(size, sums))
        return sizes


def _check_part(
    parts: ProgramParts,
    part: Sequence[Op],
    weights: Mapping[Value, torch.Tensor],
    call: KernelRecord,
    sizes: Mapping[str, int],
) -> KernelsChecked:
    """Compare what the last op of a part means with what a kernel wrote."""
    end = part[-1]
    operands = parts.operands(part, call, sizes)
    exact = _run(part, {**weights, **operands}, sizes)
    growth = _growth(part)
    drawn = _run(part, {**weights, **operands}, sizes, _Noise(parts, 0, growth))
    seeds = iter(range(1, SAMPLES))
    by_row = end.name == "nn.quantised_linear" and [*operands] == [*end.inputs[:1]]
    worst, names = 0.0, set()
    stops = list(pairwise(_stops(end, call)))
    groups: list[slice | None] = [slice(*ends) for ends in stops] or [None]
    for number, value in enumerate(end.outputs):
        if value.name not in call.results:
            continue
        names.add(call.kernels[value.name])
        rows = _owned_rows(parts, value, call)
        part_of = ... if rows is None else slice(rows)
        actual = parts.shaped(value, call.results[value.name], sizes)[part_of]
        bound = Bound(parts.dtypes[value.name], parts.inner[value], _CODES.get(end.name, 0.0))
        if end.name == "moe.sort" and number == 1:  # a choice of no expert has any slot after them
            last = call.read_after(end.outputs[2].name)[-1]
            actual = torch.where((exact[1] >= last) & (actual >= last), exact[1], actual)
        right, noisy = exact[number][part_of], drawn[number][part_of]
        errors = bound.errors(actual, right, noisy)
        integers = not (actual.is_floating_point() or actual.is_complex())
        if parts.is_low and bool((errors.isinf() | integers & (errors > 1)).any()):
            low = parts.run_as_is(part, {**weights, **operands}, sizes)[number][part_of]
            same = ~(actual.isfinite() | low.isfinite()) | integers & (actual == low)
            right = torch.where(same, low.to(right.dtype), right)
            errors = bound.errors(actual, right, noisy)
        jumps = errors > 1  # such as a comparison of nearly equal values
        while bool((errors > 1).any()) and (seed := next(seeds, None)) is not None:
            narrow = by_row and rows is None and errors.shape[-1] >= LEAST_ROW
            at = (errors > 1).any(-1) if narrow else ...
            read = {value: tensor[at] for value, tensor in operands.items()}
            sample = _run(part, {**weights, **read}, sizes, _Noise(parts, seed, growth))[number]
            other = bound.errors(actual[at], sample[part_of], noisy[at])
            before = errors[at]
            errors[at] = torch.minimum(before, torch.where(before.isinf(), before, other))
        error = float(errors.max()) if errors.numel() else 0.0
        why = _words(errors, actual, right) if error > 1 else ""
        if not why and integers and end.name in _RANKING and actual.ndim:
            dim = integer(end, "dim") if "dim" in end.attrs else -1
            pair = (actual, exact[number][part_of])
            twice, by_meaning = ((t.sort(dim)[0].diff(dim=dim) == 0).any(dim) for t in pair)
            why = "a row has one of its choices twice" if bool((twice & ~by_meaning).any()) else ""
        if not why and actual.is_floating_point():
            actual = torch.where(jumps, right.to(actual.dtype), actual)
            for of_expert in groups:
                slope, allowed = bound.slope(*(t[of_expert] for t in (actual, right, noisy)))
                error = max(error, abs(slope) / allowed)
                if abs(slope) > allowed:
                    why = f"its values are {1 + slope:.4g} times those of the op"
                    break
        worst = max(worst, error)
        if why:
            wrong = WrongKernel(call.kernels[value.name], value.name, end.line or end.origin, why)
            return KernelsChecked(frozenset(names), 1, worst, None, wrong)
    least = min((stop - start for start, stop in stops), default=None)
    return KernelsChecked(frozenset(names), 1, worst, least)


def _run(
    part: Sequence[Op],
    values: dict[Value, torch.Tensor],
    sizes: Mapping[str, int],
    noise: _Noise | None = None,
) -> tuple[torch.Tensor, ...]:
    """The results of the last op of a part."""
    if noise is not None:
        values = {v: noise.on_operand(v, t) for v, t in values.items()}
    results: tuple[torch.Tensor, ...] = ()
    chooses = any(op.name in CHOOSING for op in part)
    with torch.no_grad(), FirstOfEquals() if chooses else nullcontext():
        for op in part:
            with noise.rounding_in(op) if noise is not None else nullcontext():
                results = run_op(op, [values[value] for value in op.inputs], sizes)
            if noise is not None and op is not part[-1]:
                results = tuple(map(noise.on_result, op.outputs, results))
            values |= dict(zip(op.outputs, results, strict=True))
    return results


class _Noise:
    """Roundings, drawn at random."""

    def __init__(self, parts: ProgramParts, seed: int, growth: float) -> None:
        self._parts, self._seed = parts, seed
        self._sums = SUMS[parts.is_low] * (1.0 if parts.is_low else growth)
        self._generator = torch.Generator().manual_seed(seed)
        self._params = set(parts.graph.params)

    def rounding_in(self, op: Op) -> AbstractContextManager[object]:
        size = self._parts.inner[op.outputs[0]]
        return InFloat32(size, self._seed) if size > SUMS[self._parts.is_low] else nullcontext()

    def on_operand(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if value in self._params else self._scaled(tensor, self._sums)

    def on_result(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self._parts.dtypes[value.name]
        return self._scaled(tensor, ROUNDING[dtype] / 2) if dtype in ROUNDING else tensor

    def _scaled(self, tensor: torch.Tensor, noise: float) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        drawn = torch.randn(tensor.shape, generator=self._generator, dtype=tensor.dtype)
        return tensor * (1 + noise * drawn)


def _growth(part: Sequence[Op]) -> float:
    """By what to multiply noise on terms: roundings of a sum of K grow with K, it with the root."""
    products = [op for op in part if op.name.startswith(_PRODUCTS)]
    terms = [value.shape[-1] for op in products for value in op.inputs[:2] if value.shape]
    return max([1.0, *(float((n / 1024) ** 0.5) for n in terms if isinstance(n, int))])


def _stops(op: Op, call: KernelRecord) -> list[int]:
    """0 and the end of each expert's rows in a grouped op; empty for other ops."""
    ends = inputs_of(op).get("ends") if op.name.startswith("grouped.") else None
    if ends is None or ends.name not in call.results:
        return []
    return [0, *call.read_after(ends.name).tolist()]


def _owned_rows(parts: ProgramParts, value: Value, call: KernelRecord) -> int | None:
    """The number of rows of a value that an expert has: kernels leave out the others. None where
    all count."""
    ends = parts.ends_of.get(value)
    if ends is None or ends.name not in call.results:
        return None
    counts = call.read_after(ends.name)
    return int(counts[-1]) if len(counts) else 0


def _words(errors: torch.Tensor, actual: torch.Tensor, exact: torch.Tensor) -> str:
    worst, wrong = errors.argmax(), int((errors > 1).sum())
    index = tuple(int(i) for i in torch.unravel_index(worst, errors.shape))[: actual.ndim]
    return (
        f"{wrong} of {errors.numel()} elements; at {list(index)} it is {actual[index].item():.6g}, "
        f"and the op gives {exact[index].item():.6g}"
    )
