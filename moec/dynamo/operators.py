"""The operators that call a block and its gradient in a graph.

    moec::block_forward(inputs[], params[], site) -> y, where no gradient is wanted
    moec::block(inputs[], params[], site) -> y, with a gradient:
    moec::block_backward(grad, inputs[], params[], site, needed[]) -> the gradients needed

A site is a block of a compiled graph: its code, and its layers' weights as that code packs them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import sympy
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from moec.capture.export.autograd import autograd_inside
from moec.dynamo.code import Code, is_constant
from moec.dynamo.record import RECORDER
from moec.dynamo.training.gradients import Products, differentiable
from moec.ir.aten import TORCH_DTYPES
from moec.ir.interpret.evaluate import run_graph
from moec.ir.sizes.dims import symbols
from moec.runtime.call.executor import Executor
from moec.runtime.checks import check_inputs
from moec.runtime.device.device import device_of
from moec.torch_private import place, schema_of


@dataclass(eq=False)
class PackedParams:
    """Weights as kernels read them. The tensors that they were packed from are held, so that their
    memory is not reused."""

    arrays: Mapping[str, Any]
    held: Sequence[torch.Tensor]


@dataclass(eq=False)
class KnownParam:
    """A param whose values recognition relied on: ids or masks. `position` is that among a site's
    params, `states` the last state in which its contents were compared."""

    position: int
    contents: torch.Tensor
    states: Sequence[tuple[object, ...]] | None = None


@dataclass(eq=False)
class BoundLayer:
    """An executor with one layer's weights, which were packed when their states were `states`."""

    executor: Executor
    packed: PackedParams
    states: Sequence[tuple[object, ...]]


PACKED: WeakValueDictionary[object, PackedParams] = WeakValueDictionary()
"""By packing and state of the weights; entries live as long as a layer that is bound to them."""
_PACKING = threading.Lock()


@dataclass(eq=False)
class BlockSite:
    """One block of one compiled graph, with packed weights, on `device` (torch's name).

    Dynamo may give several layers one graph, so a site packs weights for each layer, by the first
    of its params, and drops them with that; the latest layer is kept, since parts of distributed
    weights are other tensors in each call. A layer is packed when it first runs, and again when a
    weight's version or memory differs. Sites of the same layer (for one token and for many, with
    gradients and without) share what is packed. If experts are `trained`, weights change at every
    step and are read without packing; so are inference tensors, whose changes PyTorch does not
    count. `known_params` are the params whose values recognition relied on. `copied` are the
    positions, in [*inputs, *params], of tensors that may change before the backward pass.
    """

    name: str
    code: Code
    products: Products
    device: str
    trained: bool = False
    known_params: Sequence[KnownParam] = ()
    copied: Sequence[int] = ()
    latest: BoundLayer | None = None
    layers: MutableMapping[torch.Tensor, BoundLayer] = field(
        default_factory=WeakTensorKeyDictionary
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> torch.Tensor:
        """The block's result. Raises RuntimeError if a constant used by recognition has changed."""
        for param in self.known_params:
            self._check(param, params[param.position])
        states = None if self.trained else _states(params)
        if states is None:
            with torch.no_grad():
                return self.differentiable([*inputs, *params])
        executor = self._ready(params, states)
        main = self.code.package.main
        if main.index_ranges:  # values of inputs; their types are guarded by Dynamo
            names = (port.name for port in main.inputs)
            check_inputs(main, dict(zip(names, inputs, strict=True)), self.device)
        (result,) = executor.run(inputs).values()
        output: torch.Tensor = result
        return output

    def _ready(self, params: Sequence[torch.Tensor], now: Sequence[tuple[object, ...]]) -> Executor:
        with self.lock:
            if self.latest is None or now != self.latest.states:
                self.latest = self._layer(params, now)
            return self.latest.executor

    def _layer(
        self, params: Sequence[torch.Tensor], now: Sequence[tuple[object, ...]]
    ) -> BoundLayer:
        """The layer of these params, bound to them as they are `now`."""
        layer = self.layers.get(params[0]) if params else self.latest
        if layer is not None and layer.states == now:
            return layer
        packed = _packed(self.code, params, now)
        if layer is None:
            package = replace(self.code.package, arrays=packed.arrays)
            layer = BoundLayer(Executor(package, device=device_of(self.device)), packed, now)
            if params:
                self.layers[params[0]] = layer
        else:
            layer.executor.bind(packed.arrays)
            layer.packed, layer.states = packed, now
        return layer

    def _check(self, known_param: KnownParam, param: torch.Tensor) -> None:
        states = _states([param])
        if states is not None and states == known_param.states:
            return
        if not torch.equal(known_param.contents, param):
            raise RuntimeError(
                f"{self.name}: a buffer of ids or masks changed after the block was compiled "
                "with its contents; compile again (torch._dynamo.reset())"
            )
        known_param.states = states

    def differentiable(
        self, tensors: Sequence[torch.Tensor], *, valued: bool = True
    ) -> torch.Tensor:
        """The block computed op by op with gradients, on all rows at once. `valued=False` may skip
        work that only the value needs, for a backward pass."""
        graph = self.code.expanded
        operands = tensors[: len(graph.inputs) + len(graph.params)]
        return run_graph(graph, operands, meanings=differentiable(self.products, valued=valued))[0]

    def result(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """An empty tensor with the shape and dtype of the result; the sizes may be symbolic."""
        sizes: dict[str, Any] = {}
        for value, tensor in zip(self.code.graph.inputs, inputs, strict=True):
            for dim, size in zip(value.shape, tensor.shape, strict=True):
                if not isinstance(dim, int) and dim.is_Symbol:
                    sizes[str(dim)] = size
        (y,) = self.code.graph.outputs
        shape = [dim if isinstance(dim, int) else _size(dim, sizes) for dim in y.shape]
        return inputs[0].new_empty(shape, dtype=TORCH_DTYPES[y.dtype])


def _packed(code: Code, params: Sequence[torch.Tensor], now: Sequence[object]) -> PackedParams:
    key = (code.packing, tuple(now))
    with _PACKING:
        packed = PACKED.get(key)
        if packed is None:
            packed = PackedParams(code.arrays(params), [param.detach() for param in params])
            PACKED[key] = packed
            RECORDER.add(packs=1)
    return packed


def _size(dim: Any, sizes: dict[str, Any]) -> Any:
    names = sorted(symbols(dim))
    return sympy.lambdify(names, dim)(*(sizes[name] for name in names))


_VERSION = attrgetter(place("version_of")[1])
"""Reads the version of a tensor without Python of its own: each call reads that of every weight."""


def _states(params: Sequence[torch.Tensor]) -> list[tuple[object, ...]] | None:
    """A key of the state of weights: the address, version, shape and strides of each. None where
    one is an inference tensor, which has no version."""
    try:
        return [(p.data_ptr(), _VERSION(p), p.shape, p.stride()) for p in params]
    except RuntimeError:
        return None


SITES: WeakValueDictionary[str, BlockSite] = WeakValueDictionary()
"""Sites by name; a site lives as long as the compiled graph that calls it."""


def register_site(
    where: str,
    code: Code,
    products: Products,
    device: str,
    *,
    trained: bool,
    params: Sequence[torch.Tensor] = (),
    copied: Sequence[int] = (),
) -> BlockSite:
    """A new site, which is called with the `params`. Its name is the same in every process that
    compiles the same model, so that Inductor's own cache recognises the graph."""
    stem, count = f"{where}/{code.key[:16]}", 1
    name = stem
    while name in SITES:
        count += 1
        name = f"{stem}#{count}"
    known_params = [
        KnownParam(position, param.clone())
        for position, param in enumerate(params)
        if is_constant(param)
    ]
    SITES[name] = site = BlockSite(name, code, products, device, trained, known_params, copied)
    return site


def _run(inputs: list[torch.Tensor], params: list[torch.Tensor], site: str) -> torch.Tensor:
    return SITES[site].run(inputs, params)


def _fake(inputs: list[torch.Tensor], params: list[torch.Tensor], site: str) -> torch.Tensor:
    return SITES[site].result(inputs)


block = torch.library.custom_op("moec::block", _run, mutates_args=())
block.register_fake(_fake)

# A plain kernel: what custom_op adds for gradients and aliases takes longer than the kernels of a
# small layer.
_library: Any = torch.library  # it has no types
_LIBRARY = _library.Library("moec", "FRAGMENT")
_SCHEMA = str(schema_of(torch.ops.moec.block.default))
_LIBRARY.define("block_forward" + _SCHEMA.partition("block")[2])
_LIBRARY.impl("block_forward", _run, "CPU")
_LIBRARY.impl("block_forward", _run, "CUDA")
torch.library.register_fake("moec::block_forward", _fake, lib=_LIBRARY)


@torch.library.custom_op("moec::block_backward", mutates_args=())
def block_backward(
    grad: torch.Tensor,
    inputs: list[torch.Tensor],
    params: list[torch.Tensor],
    site: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    """The gradients of the `needed` tensors of [*inputs, *params], in order."""
    tensors = [
        tensor.detach().requires_grad_(need)
        for tensor, need in zip([*inputs, *params], needed, strict=True)
    ]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    with autograd_inside():
        y = SITES[site].differentiable(tensors, valued=False)
        grads = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (grad, *tensors)}
    return [_without_aliases(gradient, storages) for gradient in grads]


def _without_aliases(tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """The tensor, copied if its memory is in `storages`: the results of a custom operator must
    alias neither its inputs nor each other. Adds its memory to `storages`."""
    address = tensor.untyped_storage().data_ptr()
    if address in storages or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        address = tensor.untyped_storage().data_ptr()
    storages.add(address)
    return tensor


@block_backward.register_fake
def _(
    grad: torch.Tensor,
    inputs: list[torch.Tensor],
    params: list[torch.Tensor],
    site: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    pairs = zip([*inputs, *params], needed, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in pairs if need]


# An operator of its own: Inductor removes an `aten.clone`, or computes it after the write.
choice_copy = torch.library.custom_op(
    "moec::choice_copy",
    lambda tensor: tensor.clone(),
    mutates_args=(),
    schema="(Tensor x) -> Tensor",
)
choice_copy.register_fake(torch.empty_like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    block_inputs, params, ctx.site = inputs
    ctx.count = len(block_inputs)
    tensors = [*block_inputs, *params]
    ctx.needed = [tensor.requires_grad for tensor in tensors]
    for position in SITES[ctx.site].copied:
        tensors[position] = choice_copy(tensors[position])
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    inputs, params = saved[: ctx.count], saved[ctx.count :]
    gradients = iter(block_backward(grad, inputs, params, ctx.site, ctx.needed))
    grads = [next(gradients) if need else None for need in ctx.needed]
    return grads[: ctx.count], grads[ctx.count :], None


block.register_autograd(_backward, setup_context=_setup)
