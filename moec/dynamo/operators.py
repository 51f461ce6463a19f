"""moec::block, the one operator that stands for a block in a graph, and its gradient.

    moec::block(inputs[], params[], site) -> y
    moec::block_backward(grad, inputs[], params[], site, needed[]) -> the gradients needed

A site is a place of a compiled graph: code, and the weights of one layer as the code wants them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from moec.aten import TORCH_DTYPES
from moec.autograd import autograd_inside
from moec.dynamo.code import Code, is_constant
from moec.dynamo.record import RECORDER
from moec.evaluate import run_graph
from moec.runtime.executor import Executor
from moec.sizes import symbols


@dataclass(eq=False)
class Site:
    """One block of one compiled graph, with its packed weights.

    They are packed when it first runs, and again when a weight's version or memory differs. The
    tensors that they were packed from are held, so that their memory is not taken by others.
    """

    name: str
    code: Code
    executor: Executor | None = None
    bound: tuple[object, ...] = ()
    held: Sequence[torch.Tensor] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(
        self, inputs: Sequence[torch.Tensor], params: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        executor = self._ready(params)
        ports = self.code.package.inputs
        given = {port.name: tensor for port, tensor in zip(ports, inputs, strict=True)}
        (result,) = executor(given).values()
        made: torch.Tensor = result
        return made

    def _ready(self, params: Sequence[torch.Tensor]) -> Executor:
        now = tuple(_state(param) for param in params)
        with self.lock:
            if self.executor is None or now != self.bound:
                if self.executor is not None:
                    self._check(params, now)
                arrays = self.code.arrays(params)
                if self.executor is None:
                    self.executor = Executor(replace(self.code.package, arrays=arrays))
                else:
                    self.executor.bind(arrays)
                self.bound, self.held = now, [param.detach() for param in params]
                RECORDER.add(packs=1)
            return self.executor

    def _check(self, params: Sequence[torch.Tensor], now: tuple[object, ...]) -> None:
        for param, old, new in zip(params, self.bound, now, strict=True):
            if is_constant(param) and old != new:
                raise RuntimeError(
                    f"{self.name}: a buffer of ids or masks changed, and the block was recognised "
                    "by what it held; compile again (torch._dynamo.reset())"
                )

    def reference(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The block in PyTorch, differentiable: the rows of each expert in turn."""
        graph = self.code.graph
        return run_graph(graph, tensors[: len(graph.inputs) + len(graph.params)])[0]

    def result(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """An empty tensor such as a call gives; the sizes may be symbols."""
        sizes: dict[str, Any] = {}
        for value, tensor in zip(self.code.graph.inputs, inputs, strict=True):
            for dim, size in zip(value.shape, tensor.shape, strict=True):
                if not isinstance(dim, int) and dim.is_Symbol:
                    sizes[str(dim)] = size
        (y,) = self.code.graph.outputs
        shape = [dim if isinstance(dim, int) else _size(dim, sizes) for dim in y.shape]
        return inputs[0].new_empty(shape, dtype=TORCH_DTYPES[y.dtype])


def _size(dim: Any, sizes: dict[str, Any]) -> Any:
    import sympy

    names = sorted(symbols(dim))
    return sympy.lambdify(names, dim)(*(sizes[name] for name in names))


def _state(param: torch.Tensor) -> tuple[object, ...]:
    """What tells that a weight is as it was: where it lies, and how often it was written to."""
    version = None if param.is_inference() else param._version
    return param.data_ptr(), version, param.shape, param.stride()


SITES: WeakValueDictionary[str, Site] = WeakValueDictionary()
"""By name; a site lives as long as the compiled graph that calls it."""


def place(where: str, code: Code) -> Site:
    """A new site. Its name is the same in every process that compiles the same model, so that
    Inductor's own cache knows the graph again."""
    stem, count = f"{where}/{code.key[:16]}", 1
    name = stem
    while name in SITES:
        count += 1
        name = f"{stem}#{count}"
    SITES[name] = site = Site(name, code)
    return site


@torch.library.custom_op("moec::block", mutates_args=())
def block(inputs: list[torch.Tensor], params: list[torch.Tensor], site: str) -> torch.Tensor:
    return SITES[site](inputs, params)


@block.register_fake
def _(inputs: list[torch.Tensor], params: list[torch.Tensor], site: str) -> torch.Tensor:
    return SITES[site].result(inputs)


@torch.library.custom_op("moec::block_backward", mutates_args=())
def block_backward(
    grad: torch.Tensor,
    inputs: list[torch.Tensor],
    params: list[torch.Tensor],
    site: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    """The gradients of those of `inputs` and `params` that are `needed`, in order."""
    tensors = [
        tensor.detach().requires_grad_(wanted)
        for tensor, wanted in zip([*inputs, *params], needed, strict=True)
    ]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with autograd_inside():
        y = SITES[site].reference(tensors)
        grads = torch.autograd.grad(y, wanted, grad, materialize_grads=True)
    return [_own(made) for made in grads]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, as the results of an operator must be."""
    return tensor.clone(memory_format=torch.contiguous_format)


@block_backward.register_fake
def _(
    grad: torch.Tensor,
    inputs: list[torch.Tensor],
    params: list[torch.Tensor],
    site: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    pairs = zip([*inputs, *params], needed, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in pairs if wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    given, params, ctx.site = inputs
    ctx.count = len(given)
    ctx.needed = [tensor.requires_grad for tensor in (*given, *params)]
    ctx.save_for_backward(*given, *params)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    inputs, params = saved[: ctx.count], saved[ctx.count :]
    made = iter(block_backward(grad, inputs, params, ctx.site, ctx.needed))
    grads = [next(made) if wanted else None for wanted in ctx.needed]
    return grads[: ctx.count], grads[ctx.count :], None


block.register_autograd(_backward, setup_context=_setup)
