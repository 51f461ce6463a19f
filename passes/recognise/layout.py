"""How the axes of a value in an MoE region relate to routed rows and to features.

The code between tokens and result may hold the rows as [T, k, D], [E, C, D], [T*k, 1, D] or
[1, D, E*H]. An axis is therefore a product of atoms, and an atom is rows (tokens, slots,
experts, positions: the proof shows which) or one feature axis. One expert's
body sees [R, features], so a reshape or permutation that only moves rows is nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from moec.errors import NoMatch
from moec.ir.dims import Dim, canonical, product
from moec.ir.graph import Value


@dataclass(frozen=True, eq=False)
class Atom:
    size: Dim
    rows: bool

    def __repr__(self) -> str:
        return f"{'rows' if self.rows else 'feature'} {self.size}"


Axis = tuple[Atom, ...]
"""The atoms of one axis, the slowest first; an axis of size 1 has none."""


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """A value seen by one expert.

    `base` is a value of the body, [R, *atoms] or, where `param`, a stack of the graph, whose
    axes are `atoms` in that order. `expert` is the stack's own expert atom (None: the same for
    all experts). `axes` arrange the atoms as the value has them; row atoms occur only there.
    """

    base: Value
    atoms: tuple[Atom, ...]
    axes: tuple[Axis, ...]
    param: bool = False
    expert: Atom | None = None
    weighted: bool = False  # a routing weight has been multiplied in
    applied: bool = False  # an expert's weights have been
    reduced: bool = False  # rows have been summed

    @property
    def features(self) -> tuple[Atom, ...]:
        """The feature atoms in the order of the axes."""
        return tuple(a for axis in self.axes for a in axis if not a.rows)

    @property
    def rows(self) -> Dim:
        return product(tuple(a.size for axis in self.axes for a in axis if a.rows))


def size_of(axis: Axis) -> Dim:
    return product(tuple(atom.size for atom in axis))


def only_rows(axis: Axis) -> bool:
    return all(atom.rows for atom in axis)


def only_features(axis: Axis) -> bool:
    return all(not atom.rows for atom in axis)


def likeness(axis: Axis) -> list[tuple[Dim, bool]]:
    """The atoms' sizes and kinds: equal for two axes whose elements correspond one to one."""
    return [(atom.size, atom.rows) for atom in axis]


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b where that is a size."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = quotient.as_numer_denom()
    return canonical(quotient) if denominator == 1 and numerator != 0 else None


def regroup(
    axes: Sequence[Axis], shape: Sequence[Dim]
) -> tuple[tuple[Axis, ...], dict[Atom, tuple[Atom, ...]]]:
    """The axes after a reshape to `shape`, and the atoms that had to be split for it.

    Raises NoMatch where `shape` does not divide the atoms.
    """
    pending = [atom for axis in axes for atom in axis]
    splits: dict[Atom, tuple[Atom, ...]] = {}
    result: list[Axis] = []
    for dim in shape:
        rest, atoms = dim, []
        while rest != 1:
            if not pending:
                raise NoMatch(f"a reshape to {dim} runs out of axes")
            atom = pending.pop(0)
            left = divide(rest, atom.size)
            if left is None:
                over = divide(atom.size, rest)
                if over is None:
                    raise NoMatch(f"a reshape cuts an axis of {atom.size} at {rest}")
                first, second = Atom(rest, atom.rows), Atom(over, atom.rows)
                _split(splits, atom, (first, second))
                pending.insert(0, second)
                atom, left = first, 1
            atoms.append(atom)
            rest = left
        result.append(tuple(atoms))
    if pending:
        raise NoMatch("a reshape leaves axes over")
    return tuple(result), splits


def _split(splits: dict[Atom, tuple[Atom, ...]], atom: Atom, parts: tuple[Atom, ...]) -> None:
    for original, pieces in splits.items():
        if atom in pieces:
            at = pieces.index(atom)
            splits[original] = (*pieces[:at], *parts, *pieces[at + 1 :])
            return
    splits[atom] = parts


def fused(axis: Axis) -> Atom:
    """One feature atom for all of the axis."""
    return axis[0] if len(axis) == 1 else Atom(size_of(axis), False)
