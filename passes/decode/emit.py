"""Emits the ATen ops that the decode program needs in addition to the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.ir.graph import Attr, Op, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.passes.core.rewrite import Builder


@dataclass(frozen=True)
class OpEmitter:
    """Emits ops in place of the op `like`."""

    builder: Builder
    like: Op

    def op(
        self,
        name: str,
        inputs: Sequence[Value],
        dtype: str,
        shape: tuple[Dim, ...],
        attrs: Mapping[str, Attr],
        named: str | None = None,
    ) -> Value:
        """Emits one op. Its output is called `named`, or after the first input."""
        (output,) = self.builder.emit(
            f"aten.{name}",
            inputs,
            [TensorType(dtype, shape)],
            like=self.like,
            attrs=attrs,
            named=named or (inputs[0].name if inputs else None),
        )
        return output

    def reshape(self, x: Value, shape: tuple[Dim, ...]) -> Value:
        return self.builder.reshape(x, shape, like=self.like, named=x.name)

    def permute(self, x: Value, axes: tuple[int, ...]) -> Value:
        """x with its axes in another order, by a reshape (which is free) if only axes of size 1
        move."""
        shape = tuple(x.shape[axis] for axis in axes)
        long = [axis for axis in axes if x.shape[axis] != 1]
        if long == sorted(long):
            return self.reshape(x, shape)
        return self.builder.permute(x, axes, like=self.like, named=x.name)

    def rows(self, x: Value, index: Value) -> Value:
        """The rows of x that index i64[N] names."""
        shape = (*index.shape, *x.shape[1:])
        return self.op("index_select.default", [x, index], x.dtype, shape, {"dim": 0})
