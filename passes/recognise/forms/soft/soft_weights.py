"""Products that weight values by a softmax of logits, read backwards from the product.

    slots = bmm(permute(softmax(logits, 1)), x)       weights [B, N, S] of x [B, S, D]
    y = bmm(softmax(logits.flatten(2), -1), outs)     weights [B, S, N] of outs [B, N, D]

The axes of the weights are followed through views and permutations. This shows which axes of the
logits the softmax is over, and which ones the product sums over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim
from moec.ir.traits import CASTS, VIEWS, is_elementwise
from moec.passes.recognise.reading.layout import Atom, Axis, regroup
from moec.passes.recognise.region import RegionEmitter, Scope

_PERMUTE, _EXPAND = "aten.permute.default", "aten.expand.default"
_PRODUCTS = ("aten.bmm.default", "aten.mm.default", "aten.matmul.default")
_SELECT = "aten.select.int"
_PICKS = (_SELECT, "aten.slice.Tensor")
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_DEEPEST = 24  # ops between a product and its softmax


@dataclass(frozen=True)
class SoftWeights:
    """The weights of a product, traced back to `logits`, whose `axes` hold atoms. `batch`, `free`
    and `summed` are the axes of the weights in the product. The softmax is over `over` (None: not
    reached yet). `picked` is an axis of which the product reads only `index`, that of one expert.
    `after` names an op that changes the result of the softmax before it is multiplied."""

    logits: Value
    axes: tuple[Axis, ...]
    batch: Axis
    free: Axis
    summed: Axis
    over: Axis | None = None
    picked: Axis = ()
    index: int = 0
    after: str = ""

    def order(self, atoms: Axis) -> tuple[int, ...]:
        """The position of each of `atoms` among all atoms of the logits."""
        every = [atom for axis in self.axes for atom in axis]
        return tuple(every.index(atom) for atom in atoms)

    def emit(self, emit: RegionEmitter, order: Sequence[int], shape: Sequence[Dim]) -> Value:
        """The logits with their atoms permuted to `order`, reshaped to `shape`."""
        sizes = [atom.size for axis in self.axes for atom in axis]
        value = emit.permute(emit.reshape(emit.old(self.logits), sizes), order)
        return emit.reshape(value, shape)


@dataclass(frozen=True)
class WeighedSum:
    """A product of soft weights with values: result[.., m, :] = sum over n of w[m, n] * v[n, :].
    `flipped`: values, weights and the result are transposed."""

    op: Op
    weights: SoftWeights
    source: Value  # the operand that contains the weights
    values: Value
    flipped: bool


def weighed_sum(scope: Scope, op: Op) -> WeighedSum | None:
    """The weighted sum at `op`; None if no operand comes from a softmax through permitted ops."""
    if op.name not in _PRODUCTS or len(op.inputs) != 2:
        return None
    for side in (0, 1):
        source, values = op.inputs[side], op.inputs[1 - side]
        if len(source.shape) not in (2, 3) or len(source.shape) != len(values.shape):
            continue
        weights = soft_weights(scope, source, flipped=side == 1)
        if weights is not None:
            return WeighedSum(op, weights, source, values, side == 1)
    return None


def soft_weights(scope: Scope, value: Value, *, flipped: bool) -> SoftWeights | None:
    """The softmax behind an operand [.., M, N] of a product, or [.., N, M] if `flipped`."""
    axes: tuple[Axis, ...] = tuple((Atom(d, True),) if d != 1 else () for d in value.shape)
    batch = axes[0] if len(axes) == 3 else ()
    free, summed = (axes[-1], axes[-2]) if flipped else (axes[-2], axes[-1])
    weights = SoftWeights(value, axes, batch, free, summed)
    for _ in range(_DEEPEST):
        op = scope.maker(weights.logits)
        if op is None or not op.inputs:
            break
        try:
            step = _trace_input(scope, op, weights)
        except NoMatch:
            return None
        if step is None:
            break
        weights = step
    return None if weights.over is None else weights


def _trace_input(scope: Scope, op: Op, weights: SoftWeights) -> SoftWeights | None:
    """The weights traced through `op` to its input; None if that is not possible. Behind the
    softmax, only views, permutations and slices are followed."""
    source = op.inputs[0]
    if op.name in VIEWS:
        axes, splits = regroup(weights.axes, source.shape)
        return _split(replace(weights, logits=source, axes=axes), splits)
    if op.name == _PERMUTE:
        dims = op.attrs["dims"]
        assert isinstance(dims, tuple)
        moved = sorted(range(len(dims)), key=lambda axis: int(str(dims[axis])))
        return replace(weights, logits=source, axes=tuple(weights.axes[axis] for axis in moved))
    if op.name in _PICKS:
        return _picked(op, weights)
    if weights.over is not None:
        return None
    if op.name in CASTS or (op.name == _EXPAND and source.shape == op.outputs[0].shape):
        return replace(weights, logits=source)
    if op.name in _SOFTMAX:
        dim = op.attrs["dim"]
        assert isinstance(dim, int)
        return replace(weights, logits=source, over=weights.axes[dim])
    soft = _written_out(scope, op, weights)
    if soft is None and is_elementwise(op.name):
        same = next((v for v in op.inputs if v.shape == op.outputs[0].shape), None)
        return None if same is None else replace(weights, logits=same, after=op.name)
    return soft


def _split(weights: SoftWeights, splits: dict[Atom, tuple[Atom, ...]]) -> SoftWeights:
    def cut(axis: Axis) -> Axis:
        return tuple(part for atom in axis for part in splits.get(atom, (atom,)))

    batch, free, summed = map(cut, (weights.batch, weights.free, weights.summed))
    over = None if weights.over is None else cut(weights.over)
    picked = cut(weights.picked)
    return replace(weights, batch=batch, free=free, summed=summed, over=over, picked=picked)


def _picked(op: Op, weights: SoftWeights) -> SoftWeights | None:
    """Traces a select of one index, or a slice that is one of several equal parts of an axis."""
    (source,), dim = op.inputs, op.attrs.get("dim", 0)
    assert isinstance(dim, int)
    dim %= len(source.shape)
    length, axes = source.shape[dim], list(weights.axes)
    if not isinstance(length, int) or weights.picked:
        return None
    if op.name == _SELECT:
        width, start = 1, op.attrs["index"]
        axes.insert(dim, ())
    else:
        width, start = op.outputs[0].shape[dim], op.attrs.get("start", 0)
        if op.attrs.get("step", 1) != 1:
            return None
    if not isinstance(width, int) or not isinstance(start, int):
        return None
    start %= length
    if length % width or start % width:
        return None
    atom = Atom(length // width, True)
    axes[dim] = (atom, *axes[dim])
    return replace(weights, logits=source, axes=tuple(axes), picked=(atom,), index=start // width)


def _written_out(scope: Scope, op: Op, weights: SoftWeights) -> SoftWeights | None:
    """A softmax written as exp(x - max) / sum(exp(x - max)), over one or more axes."""
    if op.name != "aten.div.Tensor" or len(op.inputs) != 2:
        return None
    powers, total = op.inputs
    power = scope.made_by(powers, "aten.exp.default")
    added = scope.made_by(total, "aten.sum.dim_IntList")
    if power is None or added is None or added.inputs[0] is not powers:
        return None
    dims = added.attrs.get("dim")
    if not isinstance(dims, tuple) or not added.attrs.get("keepdim"):
        return None
    shifted = scope.made_by(power.inputs[0], "aten.sub.Tensor")
    greatest = shifted and len(shifted.inputs) == 2 and scope.maker(shifted.inputs[1])
    logits = power.inputs[0]
    if shifted is not None and greatest and greatest.inputs[:1] == shifted.inputs[:1]:
        logits = shifted.inputs[0]
    axes = sorted(int(str(dim)) % len(weights.axes) for dim in dims)
    over = tuple(atom for axis in axes for atom in weights.axes[axis])
    return replace(weights, logits=logits, over=over)
