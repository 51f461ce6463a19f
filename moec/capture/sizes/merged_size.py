"""One expression for a size that has two values, each on one side of a branch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import sympy

from moec.ir.replace_sizes import indicator
from moec.ir.sizes.dims import Bounds, Dim, canonical
from moec.ir.sizes.thresholds import sizes_around, truth_of


class Unmergeable(Exception):
    """Two sides of a branch differ in more than sizes, or in sizes without a common expression."""


@dataclass
class Choice:
    """Merges sizes of two sides: `first` and `second` are the conditions under which they hold.

    `merged` has the expression for each pair of different sizes so far. Further pairs that are the
    same function of these follow from them: (4*c, 16) of (c, 4).
    """

    first: sympy.Basic
    second: sympy.Basic
    bounds: Mapping[str, Bounds]
    example: Mapping[str, int]
    merged: dict[tuple[Dim, Dim], Dim] = field(default_factory=dict)

    @property
    def expressions(self) -> tuple[sympy.Expr, ...]:
        """The merged sizes."""
        return tuple(sympy.sympify(size) for size in self.merged.values())

    def size(self, a: Dim, b: Dim) -> Dim:
        """The size that is `a` where the first side holds and `b` where the second does. Raises
        Unmergeable."""
        if a == b:
            return a
        if (a, b) not in self.merged:
            derived = _derived(a, b, self.merged)
            self.merged[a, b] = self._new(a, b) if derived is None else derived
        return self.merged[a, b]

    def _new(self, a: Dim, b: Dim) -> Dim:
        left, right = sympy.sympify(a), sympy.sympify(b)
        conditions = [truth_of(c) for c in (self.first, self.second)]
        values = [truth_of(e) for e in (left, right)]
        names = {s.name for part in (*conditions, *values) for s in part.expression.free_symbols}
        if not names or not names <= self.bounds.keys():
            return self._beside_data(left, right)
        sides = []
        for condition, value in zip(conditions, values, strict=True):
            tried = sizes_around([*conditions, *values], self.bounds, self.example)
            sides.append([(s, value.value(s)) for s in tried if condition.holds(s)])
        elsewhere = {values[0].value(size) for size, _ in sides[1]}
        for candidate in self._candidates(left, right, elsewhere):
            value = truth_of(candidate)
            if all(value.value(s) == expected for side in sides for s, expected in side):
                return canonical(candidate)
        raise Unmergeable(f"{a} and {b}")

    def _beside_data(self, a: sympy.Expr, b: sympy.Expr) -> Dim:
        """Sizes that data decide, such as the first rows of an expert, Min(rows, capacity): they
        may differ in one argument."""
        left = [part for part in a.args if part not in b.args]
        right = [part for part in b.args if part not in a.args]
        if a.func != b.func or len(left) != 1 or len(right) != 1:
            raise Unmergeable(f"{a} and {b}")
        common = (part for part in a.args if part in b.args)
        return canonical(a.func(*common, self.size(canonical(left[0]), canonical(right[0]))))

    def _candidates(
        self, a: sympy.Expr, b: sympy.Expr, elsewhere: Collection[Fraction]
    ) -> Iterator[sympy.Expr]:
        """Expressions that may have both values, the simplest first. `elsewhere` has the values of
        `a` where the second side holds; if they are one number, `a` need not occur twice."""
        yield from (a, b, sympy.Max(a, b), sympy.Min(a, b))
        for number in sorted(_moduli(self.first) | _moduli(self.second)):
            for size in (a, b):
                yield number * sympy.floor((size + number - 1) / number)
                yield number * sympy.floor(size / number)
        second = indicator(self.second)
        if second is not None and len(elsewhere) == 1:
            (value,) = elsewhere
            yield a + second * (b - sympy.Rational(value.numerator, value.denominator))
        for condition, here, there in ((self.second, b, a), (self.first, a, b)):
            truth = indicator(condition)
            if truth is not None:
                yield there + truth * (here - there)


def _moduli(condition: sympy.Basic) -> set[int]:
    """The numbers by which a condition divides, such as that of `while capacity % 8`."""
    return {int(mod.args[1]) for mod in condition.atoms(sympy.Mod) if mod.args[1].is_Integer}


def _derived(a: Dim, b: Dim, merged: Mapping[tuple[Dim, Dim], Dim]) -> Dim | None:
    """The merged size for (a, b), if both are one function of the pairs in `merged`."""
    left, right = sympy.sympify(a), sympy.sympify(b)
    pairs = [tuple(map(sympy.sympify, (x, y, z))) for (x, y), z in merged.items()]
    for expression, other, here, there in ((left, right, 0, 1), (right, left, 1, 0)):
        function, holes = expression, []
        for pair in pairs:
            hole = sympy.Dummy("size", integer=True, nonnegative=True)
            part, inverse = _part(pair[here], hole)
            if part is not None and function.has(part):
                function = function.xreplace({part: inverse})
                holes.append((hole, pair))
        at_other = function.xreplace({hole: pair[there] for hole, pair in holes})
        if holes and sympy.expand(at_other) == sympy.expand(other):
            filled = function.xreplace({hole: pair[2] for hole, pair in holes})
            return canonical(sympy.expand_mul(filled))
    return None


def _part(size: sympy.Expr, hole: sympy.Symbol) -> tuple[sympy.Expr | None, sympy.Expr]:
    """(part, expression): the part of `size` to look for in other sizes, and its expression by the
    `hole` that represents `size`: for 2*floor(T/3) + 1 they are floor(T/3) and (hole - 1)/2."""
    constant, rest = size.as_coeff_Add()
    factor, part = rest.as_coeff_Mul()
    if not size.free_symbols or part.is_Add:
        return (size if size.free_symbols else None), hole
    return part, (hole - constant) / factor
