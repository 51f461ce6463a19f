"""Weights that are read from their checkpoint when an operator needs them.

A paged weight is a tensor at an address of its own; its memory is filled before an operator reads
it, and given back when other weights need the room. Views of a paged weight are at its addresses,
so they are filled with it.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec.errors import MoecError
from moec.sources.memory.budget import TooLittleMemory
from moec.sources.memory.lock_step import LockStep, Result
from moec.sources.memory.ranges import AddressRange
from moec.sources.memory.spool import Spool
from moec.torch_private import TorchDispatchMode, pytree, schema_of, to_copy

Read = Callable[[Tensor], None]
"""Writes the values of a weight into a tensor."""


class UnreadableWeight(MoecError):
    """A weight could not be read, so that what was computed with it means nothing."""


class PagedWeights:
    """Weights of at most `limit` bytes in memory, those in use by one operator excepted. `files`
    are discarded from memory after each weight that is read. `failure` is the last error: code that
    tries what a model accepts takes it for a refusal of the model."""

    def __init__(self, limit: int, spool: Spool) -> None:
        self.limit = limit
        self.files: list[mmap.mmap] = []
        self.failure: MoecError | None = None
        self._spool = spool
        self.lock_step: LockStep | None = None
        self._samples: dict[tuple[torch.Size, torch.dtype], int] | None = None
        self._weights: dict[int, _Weight] = {}  # by address
        self._present: OrderedDict[int, int] = OrderedDict()  # bytes, least recently used first
        # modes of torch belong to a thread: those of the operator do not see how a weight is read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="moec-weights")

    def add(self, shape: torch.Size, dtype: torch.dtype, read: Read) -> Tensor:
        """A weight [shape] whose values `read` writes."""
        region = AddressRange(shape.numel() * dtype.itemsize)
        tensor = torch.frombuffer(region.buffer(), dtype=dtype).view(shape)
        self._weights[region.address] = _Weight(region, tensor, read)
        return tensor

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A paged weight with the values of one that was added, in another dtype."""
        address = self._address(tensor)
        assert address is not None
        return self.add(tensor.shape, dtype, self._weights[address].read)

    def fill(self, tensors: Iterable[Tensor]) -> None:
        """Read the paged weights at the addresses of `tensors`. Raises TooLittleMemory."""
        if isinstance(self.failure, TooLittleMemory):
            raise self.failure
        needed = {at for tensor in tensors if (at := self._address(tensor)) is not None}
        if self.lock_step is not None and not self._has(needed):
            self.lock_step.wait(needed)
        for address in needed & self._present.keys():
            self._present.move_to_end(address)
        if needed:
            self._make_room(0, needed)  # the limit may have become less
        for address in sorted(needed - self._present.keys()):
            weight = self._weights[address]
            self._make_room(weight.region.size, needed)
            self._read(weight)
            self._present[address] = weight.region.size

    def evaluate_together(self, evaluations: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of evaluations, for all of which a weight is read once (`LockStep`)."""
        self.lock_step = LockStep(self._has, lambda: ReadsWeights(self), self.limit)
        try:
            return self.lock_step.run(evaluations)
        finally:
            self.lock_step = None

    def _has(self, needed: Set[int]) -> bool:
        return needed <= self._present.keys()

    @contextmanager
    def share_values(self) -> Iterator[None]:
        """While open, all weights of one shape and dtype have the values of the first one that is
        read: enough for what does not depend on values, without reading a layer after the other."""
        self.drop()
        self._samples = {}
        try:
            yield
        finally:
            self._samples = None
            self.drop()

    def _read(self, weight: _Weight) -> None:
        key = weight.tensor.shape, weight.tensor.dtype
        if self._samples is not None and key in self._samples:
            weight.region.show(self._spool.file, self._samples[key])
            return
        weight.region.provide()
        try:
            self._reader.submit(_fill, weight).result()
        except Exception as error:
            weight.region.drop()
            self.failure = UnreadableWeight(f"a weight of the checkpoint cannot be read: {error}")
            raise self.failure from error
        for file in self.files:
            file.madvise(mmap.MADV_DONTNEED)
        if self._samples is not None:
            self._samples[key] = self._spool.write(weight.region.buffer())

    def contains(self, tensor: Tensor | None) -> bool:
        """Whether the tensor is a paged weight or a view of one."""
        return self._address(tensor) is not None

    def drop(self) -> None:
        """Give the memory of all weights back."""
        self._make_room(self.limit + 1, frozenset())

    def _address(self, tensor: Tensor | None) -> int | None:
        """The address of the weight that the tensor is a view of, if any."""
        if tensor is None or type(tensor) not in _PLAIN or tensor.device.type != "cpu":
            return None
        at = tensor.untyped_storage().data_ptr()
        return at if at in self._weights else None

    def _make_room(self, size: int, needed: Set[int]) -> None:
        for address in [address for address in self._present if address not in needed]:
            if sum(self._present.values()) + size <= self.limit:
                return
            self._weights[address].region.drop()
            del self._present[address]


@dataclass(frozen=True)
class _Weight:
    region: AddressRange
    tensor: Tensor
    read: Read


_PLAIN = (Tensor, torch.nn.Parameter)


def _fill(weight: _Weight) -> None:
    with torch.no_grad():
        weight.read(weight.tensor)


_VIEWS = frozenset(
    f"aten::{name}"
    for name in "alias as_strided chunk detach expand mT narrow permute select slice split "
    "split_with_sizes squeeze t transpose unbind unsqueeze view".split()
)
"""Operators that never read. (In inference mode, those that may copy come here as a whole.)"""


def _written(schema: Any, args: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    if not schema.is_mutable:
        return []
    values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(named)
    written = (a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    return [leaf for name in written for leaf in pytree.tree_leaves(values.get(name))]


_CASTS = (torch.ops.aten.to.dtype, to_copy)
"""How evaluations in float32 cast the weights that an operator takes."""


class ReadsWeights(TorchDispatchMode):  # type: ignore[misc]
    """A mode in which operators find the paged weights that they read. It is entered before all
    other modes, so that it sees the operators that those call."""

    def __init__(self, weights: PagedWeights) -> None:
        super().__init__()
        self.weights = weights

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if schema_of(func).name not in _VIEWS:
            leaves = pytree.tree_leaves((args, named))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if any(map(self.weights.contains, _written(schema_of(func), args, named))):
                raise MoecError(f"the model writes to one of its weights ({func})")
            self.weights.fill(tensors)
            step = self.weights.lock_step
            if step is not None and func in _CASTS and self.weights.contains(args[0]):
                cast = partial(func, *args, **named)
                return step.cast(args[0], (*args[1:], *named.items()), cast)
        return func(*args, **named)
