"""How the axes of a value in an MoE region relate to routed rows and to features.

Between the tokens and the result, the rows may have the shape [T, k, D], [E, C, D], [T*k, 1, D] or
[1, D, E*H]. An axis is therefore described as a product of atoms. An atom is either a row atom
(tokens, slots, experts or positions: the proof determines which) or a feature axis. The body of one
expert works on [R, features], so a reshape or permutation that only moves rows needs no op in the
body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim, canonical, product


@dataclass(frozen=True, eq=False)
class Atom:
    size: Dim
    rows: bool

    def __repr__(self) -> str:
        return f"{'rows' if self.rows else 'feature'} {self.size}"


Axis = tuple[Atom, ...]
"""The atoms of one axis, the slowest-varying first; an axis of size 1 has none."""


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """The layout of a value as one expert's body computes it.

    `base` is a value of the body, [R, *atoms]; if `param`, it is a stack of the graph whose axes
    are `atoms` in that order. `expert` is the expert atom of a stack (None: the weight is the same
    for all experts). `axes` arranges the atoms in the axis order of the graph's value; row atoms
    occur only in `axes`.
    """

    base: Value
    atoms: tuple[Atom, ...]
    axes: tuple[Axis, ...]
    param: bool = False
    expert: Atom | None = None
    weighted: bool = False  # already multiplied by a routing weight
    applied: bool = False  # already multiplied by an expert's weights
    reduced: bool = False  # rows are already summed

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
    """The sizes and kinds of the atoms; equal for two axes whose elements correspond one to one."""
    return [(atom.size, atom.rows) for atom in axis]


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b if that is a valid size, otherwise None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = quotient.as_numer_denom()
    return canonical(quotient) if denominator == 1 and numerator != 0 else None


def regroup(
    axes: Sequence[Axis], shape: Sequence[Dim]
) -> tuple[tuple[Axis, ...], dict[Atom, tuple[Atom, ...]]]:
    """The axes after a reshape to `shape`, and the parts of each atom that had to be split.

    Raises NoMatch if `shape` does not divide the atoms.
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
    """One feature atom for the whole axis."""
    return axis[0] if len(axis) == 1 else Atom(size_of(axis), False)
