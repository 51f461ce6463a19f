"""Layers of a model that are alike: modules of one class with equal attributes, up to their number,
that call the same operators, one after the other."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import nn

from moec.capture.calls.call import ModuleCall
from moec.capture.export.huggingface import experts_as_ops
from moec.torch_private import PRIVATE, TorchDispatchMode, pytree

# What the layers of a list do in a call of the model, each called with the result of the one
# before it.


@dataclass
class LayerCall:
    """One call of a layer: its number, its arguments beside the result of the layer before (of
    tensors, which they are), the operators that it calls with their arguments (of tensors, the
    types), and the tensors that go in and come out."""

    number: int
    beside: list[Any]
    operators: list[str] = field(default_factory=list)
    arguments: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)


def layer_calls(
    call: ModuleCall, lists: Sequence[Sequence[nn.Module]]
) -> list[list[LayerCall] | None]:
    """The calls of the layers in each of `lists`, in order; None for a list whose layers are not
    called once each, in order, with a result of the one before. Raises what the module raises."""
    calls: list[list[LayerCall]] = [[] for _ in lists]
    with ExitStack() as stack, torch.no_grad(), experts_as_ops(call.module):
        record = stack.enter_context(_Record())
        for layers, noted in zip(lists, calls, strict=True):
            for number, layer in enumerate(layers):
                for hook in record.hooks(layer, number, noted):
                    stack.callback(hook.remove)
        call(*(tensor.clone() for tensor in call.tensors))
    for noted in calls:  # what only the first layer reads is carried to it
        others = {each for later in noted[1:] for each in later.beside}
        for first in noted[:1]:
            first.beside = [each for each in first.beside if each in others]
    return [
        noted if _is_chain(noted, len(each)) else None
        for each, noted in zip(lists, calls, strict=True)
    ]


def _is_chain(calls: Sequence[LayerCall], length: int) -> bool:
    return [each.number for each in calls] == list(range(length)) and all(
        any(argument is result for argument in later.arguments for result in earlier.results)
        for earlier, later in itertools.pairwise(calls)
    )


class _Record(TorchDispatchMode):  # type: ignore[misc]
    """Notes the operators that the layer which runs calls."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[LayerCall] = []

    def hooks(self, layer: nn.Module, number: int, calls: list[LayerCall]) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            results = calls[-1].results if calls else []
            carried = {id(result) for result in results}
            leaves = pytree.tree_leaves((args, kwargs))
            beside = [_named(leaf) for leaf in leaves if id(leaf) not in carried]
            calls.append(LayerCall(number, beside, [], _tensors((args, kwargs))))
            self.running.append(calls[-1])

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self.running.pop().results.extend(_tensors(result))

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.running:
            described = pytree.tree_map(_described, (args, dict(kwargs or {})))
            self.running[-1].operators.append(f"{func} {described}")
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    tensor = isinstance(value, torch.Tensor)
    return f"{value.dtype} {tuple(value.shape)} {value.stride()}" if tensor else value


def _named(value: Any) -> Any:
    """An argument beside the last layer's result: of tensors, which one it is."""
    return id(value) if isinstance(value, torch.Tensor) else repr(value)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


_TENSORS = (PRIVATE["parameters_of"].attribute, PRIVATE["buffers_of"].attribute)


@dataclass(frozen=True)
class LayerList:
    """A list of layers. `kinds` has the number of the first layer that each one is like."""

    path: str
    layers: nn.ModuleList | nn.Sequential
    kinds: tuple[int, ...]

    @property
    def traced(self) -> int:
        """How many of the first layers have two of the kind of each later one."""
        kinds = self.kinds
        lengths = range(len(kinds) + 1)
        return next(n for n in lengths if all(kinds[:n].count(kind) >= 2 for kind in kinds[n:]))

    @property
    def untraced(self) -> tuple[int, ...]:
        """The kinds of the layers after those."""
        return self.kinds[self.traced :]

    @property
    def is_long(self) -> bool:
        """Whether tracing the first layers takes at most half of the time that all take."""
        return len(self.untraced) >= max(self.traced, 3)

    def path_of(self, number: int) -> str:
        """The path of a layer in the model."""
        return f"{self.path}.{number}" if self.path else str(number)


def layer_lists(call: ModuleCall) -> list[LayerList]:
    """The lists of layers of which at most half have to be traced; no list within another. Runs
    the module where layers have equal attributes. Raises what it raises."""
    lists: list[LayerList] = []
    for path, module in call.module.named_modules():
        within = any(path.startswith(f"{each.path}." if each.path else "") for each in lists)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not within:
            each = LayerList(path, module, _kinds(module))
            owner = call.module.get_submodule(path.rpartition(".")[0])
            if each.is_long and not number_decides(owner, list(module)):
                lists.append(each)
    calls = layer_calls(call, [list(each.layers) for each in lists]) if lists else []
    called = [
        replace(
            each,
            kinds=_first_equal(
                [*zip(each.kinds, ([c.beside, c.operators] for c in noted), strict=True)]
            ),
        )
        for each, noted in zip(lists, calls, strict=True)
        if noted is not None
    ]
    return [each for each in called if each.is_long]


@contextmanager
def shortened(lists: Sequence[LayerList]) -> Iterator[None]:
    """While open, lists have only the layers that are traced."""
    modules = [list(each.layers) for each in lists]
    try:
        for each in lists:
            del each.layers[each.traced :]
        yield
    finally:
        for each, layers in zip(lists, modules, strict=True):
            each.layers.extend(layers[len(each.layers) :])


def _kinds(layers: nn.ModuleList | nn.Sequential) -> tuple[int, ...]:
    """For each layer, the number of the first one whose attributes are equal, up to the number. No
    layers are alike that share weights or have names, or of which one is there twice."""
    modules = list(layers)
    names = [name for name, _ in layers.named_children()]
    weights = [id(weight) for module in modules for weight in module.parameters()]
    if names != [str(n) for n in range(len(modules))] or len({*weights}) < len(weights):
        return tuple(range(len(modules)))
    kinds: list[int] = []
    for number, module in enumerate(modules):
        firsts = sorted(set(kinds))
        like = (n for n in firsts if _Attributes(n, number).equal(modules[n], module))
        kinds.append(next(like, number))
    return tuple(kinds)


def _first_equal(items: Sequence[Hashable]) -> tuple[int, ...]:
    return tuple(map(items.index, items))


class _Attributes:
    """Compares the attributes of two layers of these numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.compared: set[tuple[int, int]] = set()

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two values are equal, or the numbers of the layers; parameters and buffers of a
        module have equal types."""
        if one is other or (id(one), id(other)) in self.compared:
            return True
        if type(one) is not type(other):
            return False
        self.compared.add((id(one), id(other)))
        if isinstance(one, nn.Module):
            return self._same_items(vars(one), vars(other))
        if isinstance(one, Mapping):
            return self._same_items(one, other)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(self.equal, one, other))
        if isinstance(one, MethodType):
            return one.__func__ is other.__func__ and self.equal(one.__self__, other.__self__)
        if isinstance(one, torch.Tensor):
            return _type(one) == _type(other) and torch.equal(one, other)
        if isinstance(one, int) and not isinstance(one, bool) and (one, other) == self.numbers:
            return True
        return isinstance(one, bool | int | float | str | bytes | set) and one == other

    def _same_items(self, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
        return list(one) == list(other) and all(
            _types(value) == _types(other[name])
            if name in _TENSORS
            else self.equal(value, other[name])
            for name, value in one.items()
        )


def _types(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, object]:
    return {name: None if tensor is None else _type(tensor) for name, tensor in tensors.items()}


def _type(tensor: torch.Tensor) -> object:
    return type(tensor), tensor.shape, tensor.dtype, tensor.stride()


# Whether code may decide by the number of a layer: `if self.layer_idx >= 28 and tokens > 4096`.
#
# A call of the example takes one side of such a condition, so that only the code shows it.
_DECIDES = (ast.Compare, ast.BinOp, ast.BoolOp, ast.IfExp)


def number_decides(owner: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether the methods of layers compute with an attribute that has a layer's number, or the
    forward of their owner with the index of a loop. True where there is no source to read."""
    last = len(layers) - 1
    pairs = [*zip(layers[0].modules(), layers[last].modules(), strict=False)]
    names = {
        name
        for one, other in pairs
        for name, value in vars(one).items()
        if (value, vars(other).get(name)) == (0, last)
    }
    parts = {type(part) for part, _ in pairs}
    return any(_uses(cls, names, (*_DECIDES, ast.Subscript)) for cls in parts if names) or _uses(
        type(owner), None, _DECIDES
    )


def _uses(cls: type, names: set[str] | None, kinds: tuple[type[ast.AST], ...]) -> bool:
    """Whether nodes of these kinds have one of the attributes `names`, or the index of a loop."""
    try:
        methods = [*_methods(cls)]
    except (OSError, TypeError, SyntaxError):
        return True
    for method in methods:
        indices = set() if names is not None else set(_indices(method))
        if names is None and method.name != "forward":
            continue
        for node in ast.walk(method):
            direct = [*node.args, *(k.value for k in node.keywords)] if _is_call(node) else []
            if any(isinstance(part, ast.Name) and part.id in indices for part in direct):
                return True
            if isinstance(node, kinds) and any(
                (isinstance(part, ast.Attribute) and part.attr in (names or ()))
                or (isinstance(part, ast.Name) and part.id in indices)
                for part in ast.walk(node)
            ):
                return True
    return False


def _is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call)


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    for base in cls.__mro__:
        if base is object or str(base.__module__).startswith("torch."):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                yield node


def _indices(method: ast.FunctionDef) -> Iterator[str]:
    """The numbers that loops of `enumerate` and `range` count."""
    for loop in ast.walk(method):
        if isinstance(loop, ast.For | ast.comprehension) and isinstance(loop.iter, ast.Call):
            if ast.unparse(loop.iter.func) in ("enumerate", "range"):
                yield from (n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name))
