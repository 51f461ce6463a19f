"""The operators that call a block and its gradient in a graph.

    moec::block_forward(inputs[], params[], site) -> y, where no gradient is wanted
    moec::block(inputs[], params[], site) -> y, with a gradient:
    moec::block_backward(grad, inputs[], params[], site, needed[]) -> the gradients needed

A site is a block of a compiled graph: its code, and one layer's weights as that code packs them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import sympy
import torch

from moec.capture.export.autograd import autograd_inside
from moec.dynamo.code import Code, is_constant
from moec.dynamo.record import RECORDER
from moec.dynamo.training.gradients import Products, differentiable
from moec.interpret.evaluate import run_graph
from moec.ir.aten import TORCH_DTYPES
from moec.ir.sizes.dims import symbols
from moec.runtime.call.executor import Executor
from moec.runtime.checks import check_inputs
from moec.runtime.device.device import device_of


@dataclass(eq=False)
class PackedParams:
    """Weights as kernels read them. The tensors that they were packed from are held, so that their
    memory is not reused."""

    arrays: Mapping[str, Any]
    held: Sequence[torch.Tensor]


PACKED: WeakValueDictionary[object, PackedParams] = WeakValueDictionary()
"""By packing and state of the weights; entries live as long as a site that uses them."""
_PACKING = threading.Lock()


@dataclass(eq=False)
class BlockSite:
    """One block of one compiled graph, with its packed weights, on `device` (torch's name).

    They are packed when it first runs, and again when a weight's version or memory differs. Sites
    of the same layer (for one token and for many, with gradients and without) share them. If
    experts are `trained`, weights change at every step and are read without packing.
    """

    name: str
    code: Code
    products: Products
    device: str
    trained: bool = False
    executor: Executor | None = None
    bound: Sequence[tuple[object, ...]] = ()
    packed: PackedParams | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> torch.Tensor:
        """The block's result. Raises RuntimeError if a constant used by recognition has changed."""
        if self.trained:
            with torch.no_grad():
                return self.differentiable([*inputs, *params])
        executor = self._ready(params)
        main = self.code.package.main
        if main.index_ranges:  # values of inputs; their types are guarded by Dynamo
            names = (port.name for port in main.inputs)
            check_inputs(main, dict(zip(names, inputs, strict=True)), self.device)
        (result,) = executor.run(inputs).values()
        output: torch.Tensor = result
        return output

    def _ready(self, params: Sequence[torch.Tensor]) -> Executor:
        now = _states(params)
        with self.lock:
            if self.executor is None or now != self.bound:
                if self.executor is not None:
                    self._check(params, now)
                packed = _packed(self.code, params, now)
                if self.executor is None:
                    package = replace(self.code.package, arrays=packed.arrays)
                    self.executor = Executor(package, device=device_of(self.device))
                else:
                    self.executor.bind(packed.arrays)
                self.bound, self.packed = now, packed
            return self.executor

    def _check(self, params: Sequence[torch.Tensor], now: Sequence[object]) -> None:
        for param, old, new in zip(params, self.bound, now, strict=True):
            if is_constant(param) and old != new:
                raise RuntimeError(
                    f"{self.name}: a buffer of ids or masks changed after the block was compiled "
                    "with its contents; compile again (torch._dynamo.reset())"
                )

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


def _states(params: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    """A key of the state of weights: the address, version, shape and strides of each."""
    return [
        (p.data_ptr(), None if p.is_inference() else p._version, p.shape, p.stride())
        for p in params
    ]


SITES: WeakValueDictionary[str, BlockSite] = WeakValueDictionary()
"""Sites by name; a site lives as long as the compiled graph that calls it."""


def register_site(
    where: str, code: Code, products: Products, device: str, *, trained: bool
) -> BlockSite:
    """A new site. Its name is the same in every process that compiles the same model, so that
    Inductor's own cache recognises the graph."""
    stem, count = f"{where}/{code.key[:16]}", 1
    name = stem
    while name in SITES:
        count += 1
        name = f"{stem}#{count}"
    SITES[name] = site = BlockSite(name, code, products, device, trained)
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
_LIBRARY.define("block_forward" + str(torch.ops.moec.block.default._schema).partition("block")[2])
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    block_inputs, params, ctx.site = inputs
    ctx.count = len(block_inputs)
    ctx.needed = [tensor.requires_grad for tensor in (*block_inputs, *params)]
    ctx.save_for_backward(*block_inputs, *params)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    inputs, params = saved[: ctx.count], saved[ctx.count :]
    gradients = iter(block_backward(grad, inputs, params, ctx.site, ctx.needed))
    grads = [next(gradients) if need else None for need in ctx.needed]
    return grads[: ctx.count], grads[ctx.count :], None


block.register_autograd(_backward, setup_context=_setup)
