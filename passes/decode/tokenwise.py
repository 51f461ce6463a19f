"""Which ops treat tokens independently, so that chunks of tokens give the same results.

An axis counts tokens if its size contains the name of the sequence. An op is safe if it is
element-wise, or works along axes that do not count tokens in any of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moec.errors import NoMatch
from moec.ir import traits
from moec.ir.graph import Op, Value
from moec.ir.ops import OPS
from moec.ir.sizes.dims import symbols
from moec.ir.traits import PRODUCTS

_SPREADS = frozenset(
    f"aten.{name}.default"
    for name in ("expand", "full_like", "ones_like", "scalar_tensor", "zeros_like")
)
"""Ops that broadcast an element of their input, or only read its shape."""
_CREATES = frozenset(
    f"aten.{name}"
    for name in ("full.default", "zeros.default", "ones.default", "empty.memory_format")
)
_MOVES = frozenset({"aten.reshape.default", "aten.view.default", "aten.permute.default"})
_LOOKUPS = frozenset({"aten.embedding.default", "aten.index.Tensor"})
_PICKS = ("aten.gather.default", "aten.index_select.default")
_ALONG = frozenset(
    f"aten.{name}"
    for name in (
        "sum.dim_IntList mean.dim amax.default amin.default _softmax.default softmax.int "
        "_log_softmax.default _safe_softmax.default topk.default sort.default sort.stable "
        "argsort.default argmax.default cumsum.default prod.dim_int any.dim any.dims all.dim "
        "logsumexp.default gather.default scatter.src scatter.value scatter_add.default "
        "slice.Tensor select.int cat.default split.Tensor split_with_sizes.default "
        "unbind.int index_select.default flip.default linalg_vector_norm.default var.correction "
        "slice_scatter.default select_scatter.default glu.default"
    ).split()
)
_AXES = ("dim", "dims", "axis")


def counts(value: Value, axis: int, sequence: str) -> bool:
    """Whether an axis of a value counts tokens."""
    return sequence in symbols(value.shape[axis])


def has_tokens(value: Value, sequence: str) -> bool:
    return any(sequence in symbols(dim) for dim in value.shape)


def is_elementwise(op: Op) -> bool:
    """Whether an element of the result depends on the same token's elements alone."""
    return (op.name in _SPREADS or traits.is_elementwise(op.name)) and len(op.outputs) == 1


def require_tokenwise(op: Op, sequence: str) -> None:
    """Raises NoMatch, naming the op, if it may mix tokens."""
    if not any(has_tokens(value, sequence) for value in (*op.inputs, *op.outputs)):
        return
    definition = OPS.get(op.name)
    if definition is not None and definition.tokenwise:
        return
    if op.name in _CREATES or is_elementwise(op):
        return
    for names, holds in _RULES:
        if op.name in names:
            if holds(op, sequence):
                return
            raise NoMatch(f"{op.name} at {_where(op)} mixes tokens")
    raise NoMatch(f"{op.name} at {_where(op)} may mix tokens: no rule is known for this op")


def _where(op: Op) -> str:
    return op.origin or op.outputs[0].name


def _moves(op: Op, sequence: str) -> bool:
    """Any permutation; a reshape if the batch and the tokens stay the outer axes."""
    if op.name == "aten.permute.default":
        return True
    source, out = (_token_axes(v, sequence) for v in (op.inputs[0], op.outputs[0]))
    return len(source) == 1 and len(out) == 1


def _token_axes(value: Value, sequence: str) -> list[int]:
    return [axis for axis in range(len(value.shape)) if counts(value, axis, sequence)]


def _product(op: Op, sequence: str) -> bool:
    """A matrix product with tokens in one operand only, and not along the axis that is summed."""
    first = PRODUCTS[op.name]
    left, right = op.inputs[first : first + 2]
    summed = ((left, -1), (right, -1 if op.name == "aten.linear.default" else -2))
    held = [(value, axis) for value, axis in summed if has_tokens(value, sequence)]
    others = [value for value in op.inputs if value not in (left, right)]
    return (
        len(held) == 1
        and not any(counts(value, axis, sequence) for value, axis in held)
        and not any(has_tokens(value, sequence) for value in others)
    )


def _layer_norm(op: Op, sequence: str) -> bool:
    (x, *rest), shape = op.inputs, op.attrs.get("normalized_shape")
    return isinstance(shape, tuple) and not (
        any(counts(x, -1 - i, sequence) for i in range(len(shape)))
        or any(has_tokens(value, sequence) for value in rest)
    )


def _repeat(op: Op, sequence: str) -> bool:
    """A repeat along axes that do not count tokens."""
    (x,), repeats = op.inputs, op.attrs.get("repeats")
    if not isinstance(repeats, tuple):
        return False
    return all(
        times == 1 or not counts(x, axis - len(repeats), sequence)
        for axis, times in enumerate(repeats)
        if len(repeats) - axis <= len(x.shape)
    )


def _lookup(op: Op, sequence: str) -> bool:
    """A lookup in a table without an axis of tokens."""
    return not has_tokens(op.inputs[0], sequence)


def _acts_on_sequence(op: Op, sequence: str) -> bool:
    """Along axes that no operand has tokens on; or what picks from a table without tokens."""
    axes, (first, *rest) = list(_axes(op)), op.inputs
    if op.name in _PICKS and not has_tokens(first, sequence):
        return True
    if op.name == "aten.index_select.default" and has_tokens(rest[0], sequence):
        return False
    alike = [value for value in op.inputs if len(value.shape) == len(first.shape) > 0]
    return bool(axes) and not any(counts(value, axis, sequence) for value in alike for axis in axes)


def _axes(op: Op) -> Iterable[int]:
    for name in _AXES:
        held = op.attrs.get(name)
        if isinstance(held, int) and not isinstance(held, bool):
            yield held
        elif isinstance(held, tuple):
            yield from (axis for axis in held if isinstance(axis, int))
    if op.name in _LAST and not any(name in op.attrs for name in _AXES):
        yield -1
    if op.name in _FIRST and "dim" not in op.attrs:
        yield 0


_LAST = (
    "aten.glu.default",
    "aten.topk.default",
    "aten.sort.default",
    "aten.sort.stable",
    "aten.argsort.default",
)
_FIRST = (
    "aten.slice_scatter.default",
    "aten.slice.Tensor",
    "aten.cat.default",
    "aten.split.Tensor",
    "aten.unbind.int",
)

_RULES: tuple[tuple[frozenset[str], Callable[[Op, str], bool]], ...] = (
    (_MOVES, _moves),
    (frozenset(PRODUCTS), _product),
    (_ALONG, _acts_on_sequence),
    (frozenset({"aten.layer_norm.default", "aten.native_layer_norm.default"}), _layer_norm),
    (frozenset({"aten.repeat.default"}), _repeat),
    (_LOOKUPS, _lookup),
)
