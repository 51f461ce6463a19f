"""Proof by running: a region and its replacement must agree on random inputs.

Two graphs over the same input and param values are evaluated in eager PyTorch, with several token
counts and with routings that have ties, empty experts, all tokens on one expert, and overflowing
capacities. Low-precision floats are upcast to float32 in both graphs, so that rounding makes no
difference. In a model whose weights are all wider, a region that rounds to 16 bits does so on
purpose, and a replacement that does not is refused. Weights are random and of the real shapes;
large ones are overlapping windows of a small random pool, so that they cost no memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy
import torch

from moec.dtypes import FLOATS
from moec.errors import IRError, NoMatch
from moec.ir.canonical import canonical_text
from moec.ir.graph import Graph, Op, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.ir.interpret.threads import threads_for
from moec.ir.sizes.dims import Bounds, symbols
from moec.ir.sizes.thresholds import nearest_allowed
from moec.ir.upcast import widen
from moec.passes.proof.branch_coverage import branch_taken, require_both_branches, thresholds
from moec.passes.proof.input_generators import Feed, correction_scale, input_cases, sample
from moec.passes.proof.random_params import RandomParams, is_constant
from moec.torch_private import pytree

TOLERANCE = 2e-4
"""Tolerance, relative to the largest result: float32 sums of a few thousand terms, reordered."""
_COUNTS = (1, 5, 13)
_MOST = 1 << 11
_ORDERINGS = tuple(f"aten.{name}.Scalar" for name in ("lt", "le", "gt", "ge"))
_SCORES = ("aten.softmax.int", "aten.sigmoid.default", "aten.div.Tensor")
_NARROW = (torch.bfloat16, torch.float16)
_HEAVY = 1 << 24  # elements of weights: beyond it only one token count is tried


Results = Sequence[torch.Tensor]
Inputs = Mapping[Value, torch.Tensor]
Compare = Callable[[Results, Results, Inputs], str]
"""Returns why two results differ, or an empty string."""

Bind = Callable[[Inputs], Mapping[str, int]]
"""Computes the data-dependent sizes from the inputs of a case."""


@dataclass(frozen=True)
class Case:
    """Random inputs in the order of the region's, and the region's results."""

    name: str
    inputs: Sequence[torch.Tensor]
    env: Mapping[str, int]
    result: Results
    scale: float  # of the params that correct scores


@dataclass
class Cases:
    """The cases of a region, each computed when it is first read: most wrong replacements fail on
    the first."""

    source: Iterator[Case]
    computed: list[Case] = field(default_factory=list)
    failure: str = ""

    def __iter__(self) -> Iterator[Case]:
        """Raises NoMatch if the region cannot be run, or a decision has one outcome."""
        for number in itertools.count():
            if number == len(self.computed) and not self._compute():
                return
            yield self.computed[number]

    def _compute(self) -> bool:
        """Whether there is another case."""
        if self.failure:  # a generator that raised would look exhausted
            raise NoMatch(self.failure)
        try:
            self.computed.append(next(self.source))
        except StopIteration:
            return False
        except NoMatch as why:
            self.failure = str(why)
            raise
        return True


def _run(
    which: str, graph: Graph, tensors: Sequence[torch.Tensor], env: Mapping[str, int]
) -> Results:
    try:
        with FirstOfEquals():  # as kernels choose
            return run_graph(graph, tensors, env)
    except (RuntimeError, IRError, IndexError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoMatch(f"{which} fails on random inputs: {reason}") from None


@dataclass
class Prover:
    """Proves pairs of graphs, equal pairs once. `weights` are the program's weights."""

    weights: Mapping[str, torch.Tensor]
    verdicts: dict[str, str] = field(default_factory=dict)
    runs: dict[str, Cases] = field(default_factory=dict)

    @cached_property
    def params(self) -> RandomParams:
        return RandomParams(self.weights)

    def prove(
        self,
        before: Graph,
        after: Graph,
        feeds: Mapping[Value, Feed],
        *,
        limits: Sequence[int] = (),
        decisions: Sequence[Op] = (),
        compare: Compare | None = None,
        bind: Bind | None = None,
        explained: bool = True,
    ) -> None:
        """Raises NoMatch with the case on which the graphs differ, or why one cannot be run.

        `limits` are counts (capacities) that some case must exceed, `decisions` ops of `before`
        that must come out in more than one way. A decision with one outcome refuses every
        replacement, and is the reason to report; it takes all cases to see, so they are run first
        only if the reason is to be `explained`.
        """
        if (narrow := _rounds_to(before)) and not _rounds_to(after) and self._wide:
            raise NoMatch(f"it rounds to {narrow}, which its replacement does not")
        counts = _counts([*limits, *_limits(before), *_limits(after), *_thresholds(before)])
        order = [repr(feeds.get(value)) for value in before.inputs]
        watched = [before.ops.index(op) for op in decisions]
        fixed = [*order, repr((tuple(counts), watched)), self._constants(before)]
        left = "\n".join([canonical_text(before), *fixed])
        key = left + canonical_text(_with_interface_of(before, after))
        if key not in self.verdicts:
            with threads_for(_elements(before)):
                try:
                    if left not in self.runs:
                        cases = self._cases(before, feeds, counts, bind, decisions)
                        self.runs[left] = Cases(cases)
                    if decisions and explained:
                        list(self.runs[left])
                    self._compare(self.runs[left], before, after, compare or compare_results)
                    self.verdicts[key] = ""
                except NoMatch as why:
                    self.verdicts[key] = str(why)
        if self.verdicts[key]:
            raise NoMatch(self.verdicts[key])

    def _compare(self, cases: Cases, before: Graph, after: Graph, compare: Compare) -> None:
        wide = widen(after)
        if all(_is_zero(case) for case in cases):
            raise NoMatch("its result is 0 on all random inputs: every block agrees")
        for case in cases:
            result = _run("its replacement", wide, self._tensors(case, before, after), case.env)
            wrong = compare(case.result, result, dict(zip(before.inputs, case.inputs, strict=True)))
            if wrong:
                raise NoMatch(f"{wrong} ({case.name})")

    @cached_property
    def _wide(self) -> bool:
        return all(weight.dtype not in _NARROW for weight in self.weights.values())

    def _constants(self, graph: Graph) -> str:
        fixed = (self.weights.get(p.name) for p in graph.params if is_constant(p))
        return repr([t.tolist() if t is not None and t.numel() < 4096 else None for t in fixed])

    def _cases(
        self,
        before: Graph,
        feeds: Mapping[Value, Feed],
        counts: Sequence[int],
        bind: Bind | None,
        decisions: Sequence[Op],
    ) -> Iterator[Case]:
        generator = torch.Generator().manual_seed(20)
        if _elements(before) > _HEAVY:
            counts = counts[-1:]
        wide = widen(before)
        results, by_name = len(wide.outputs), {v.name: v for v in wide.values()}
        watched = [by_name[v.name] for op in decisions for v in (op.inputs[0], op.outputs[0])]
        wide = replace(wide, outputs=(*wide.outputs, *watched))
        outcomes = []
        for sizes in _sizes(before, counts):
            for pattern in input_cases(feeds, thresholds(decisions)):
                inputs = [
                    sample(value, feeds.get(value), pattern, sizes, generator)
                    for value in before.inputs
                ]
                named = dict(zip(before.inputs, inputs, strict=True))
                env = dict(sizes) | dict(bind(named) if bind else {})
                scale = correction_scale(pattern)
                params = self.params.of(before, before.params, scale)
                result = _run("it", wide, [*inputs, *params], env)
                shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
                name = f"{pattern}{'; ' + shown if shown else ''}"
                watched_values = result[results:]
                outcomes.append(
                    [*map(branch_taken, decisions, watched_values[::2], watched_values[1::2])]
                )
                yield Case(name, inputs, env, result[:results], scale)
        require_both_branches(decisions, outcomes)

    def _tensors(self, case: Case, before: Graph, after: Graph) -> list[torch.Tensor]:
        """The inputs and params of `after` in a case of `before`."""
        inputs = dict(zip(before.inputs, case.inputs, strict=True))
        params = self.params.of(before, after.params, case.scale)
        return [*(inputs[v] for v in after.inputs), *params]


def _elements(graph: Graph) -> int:
    return sum(math.prod(map(int, param.shape)) for param in graph.params)


def _is_zero(case: Case) -> bool:
    return not any(bool(result.any()) for result in case.result)


def _limits(graph: Graph) -> Iterator[int]:
    """The constant integers that values are compared with, as slots are with a capacity."""
    for op in graph.ops:
        other = op.attrs.get("other")
        if op.name not in _ORDERINGS or not isinstance(other, int | float):
            continue
        if op.inputs[0].dtype in FLOATS:  # if it is high: a threshold, not a capacity
            if 1 < other <= _MOST - 9 and float(other).is_integer():
                yield int(other)
        elif type(other) is int and op.inputs[0].dtype != "bool":
            yield other


def _thresholds(graph: Graph) -> Iterator[int]:
    """The numbers at which a size expression changes to another, as Min(tokens, 64) does: what
    holds on one side may not hold on the other."""
    shapes = [dim for value in graph.values() for dim in value.shape]
    attrs = [leaf for op in graph.ops for leaf in pytree.tree_leaves(list(op.attrs.values()))]
    parts = {
        part
        for size in {*shapes, *attrs}
        if isinstance(size, sympy.Expr) and size.free_symbols
        for part in sympy.preorder_traversal(size)
        if isinstance(part, sympy.Min | sympy.Max)
    }
    for part in parts:
        yield from (abs(int(number)) for number in part.atoms(sympy.Integer))


def _counts(limits: Sequence[int]) -> tuple[int, ...]:
    """Token counts to try; the last exceeds every limit, so that each limit binds in a case."""
    most = max((limit + 9 for limit in limits), default=0)
    if most > _MOST:
        raise NoMatch(
            f"it counts up to {most - 9}, and the proof goes up to {_MOST} tokens: longer inputs "
            "would not be covered"
        )
    return (*_COUNTS[:-1], max(_COUNTS[-1], most))


def _rounds_to(graph: Graph) -> str:
    """The dtype of 16 bits to which a graph rounds wider floats or scores; "" where it does not."""
    for op in graph.ops:
        if op.outputs and (dtype := op.outputs[0].dtype) in ("bf16", "f16"):
            wide = any(value.dtype in ("f32", "f64") for value in op.inputs)
            if wide or op.name in _SCORES:
                return dtype
        if op.body is not None and (narrow := _rounds_to(op.body)):
            return narrow
    return ""


def _sizes(graph: Graph, counts: Sequence[int]) -> Iterator[dict[str, int]]:
    names = sorted({n for v in graph.inputs for d in v.shape for n in symbols(d)})
    if not names:
        yield {}
        return
    for index in range(len(counts)):
        sizes = {}
        for position, name in enumerate(names):
            limits = graph.bounds.get(name, Bounds())
            count = counts[(index + position) % len(counts)] if position else counts[index]
            count = max(count, limits.low, 1)
            sizes[name] = count if limits.high is None else min(count, limits.high)
        yield nearest_allowed(graph.bounds, sizes)


def compare_results(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    inputs: Mapping[Value, torch.Tensor],
) -> str:
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return f"its shape is {tuple(a.shape)}, its replacement's {tuple(b.shape)}"
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        if not bool(a.isfinite().all()):
            return "it is not finite on random inputs"
        error = float((a - b).abs().max())
        if not error <= TOLERANCE * max(float(a.abs().max()), 1e-3):
            return f"the numbers differ by {error:.2g} of {float(a.abs().max()):.2g}"
    return ""


def _with_interface_of(before: Graph, after: Graph) -> Graph:
    """`after` with the inputs and params of `before` first, so that the key identifies them."""
    both = dict.fromkeys((*before.inputs, *before.params))
    return replace(after, inputs=(*both,), params=tuple(p for p in after.params if p not in both))
