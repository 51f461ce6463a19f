"""Traces Dynamo's graph to functional ATen operators, before autograd, for recognition.

The operators are those of `moec.capture.decomposition`, so that a block looks the same as in a
capture. Tracing uses Dynamo's own fake mode; sizes stay symbolic and are never evaluated here.
Switches of the grad mode stay in the graph; writes into inputs become one `copy_` each, at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx import traceback as fx_traceback

from moec.capture.decomposition import decompositions
from moec.errors import NoMatch
from moec.runtime.device.device import CPU, CUDA
from moec.torch_private import (
    PRIVATE,
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    HigherOrderOperator,
    LocalSource,
    TensorifyScalarRestartAnalysis,
    TensorifyState,
    TracingContext,
    assert_scalar,
    enable_python_dispatcher,
    expr_of,
    from_functional_tensor,
    has_data_mutation,
    has_metadata_mutation,
    layer_stack_depth,
    make_fx,
    pytree,
    sync,
    to_copy,
    undo_layer_stack,
)

_DATA = "_get_data_attr"
_SOURCE = PRIVATE["dynamo_source_of"].attribute
STATIC = "_dynamo_static_input_type"


def trace(module: fx.GraphModule, inputs: Sequence[Any], *, training: bool) -> fx.GraphModule:
    """The module traced to ATen operators, with the same inputs. Raises NoMatch, with the reason,
    where PyTorch cannot trace it."""
    enabled = any(map(torch.is_autocast_enabled, (CPU, CUDA)))
    if enabled or any("autocast" in str(node.target) for node in module.graph.nodes):
        raise NoMatch("autocast is on, and its casts are not in the graph; cast the model instead")
    for node in module.graph.nodes:
        if training and isinstance(node.target, HigherOrderOperator):
            raise NoMatch(f"{node.target} has its own backward, which tracing would lose")
        if _detaches(node) and any(_writes(user) for user in node.users):
            raise NoMatch(f"the graph writes into {node.name}, a detached tensor")
    _fix_numbers(module)
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    fake = [_fake(mode, context, value) for value in inputs]
    depth = layer_stack_depth()
    try:
        with mode, enable_python_dispatcher(), fx_traceback.preserve_node_meta():
            traced: fx.GraphModule = make_fx(
                _functional(module), decomposition_table=decompositions(), pre_dispatch=True
            )(*fake)
    except Exception as error:
        # A failure inside a vmap leaves the vmap open, and Dynamo's guards would see it.
        undo_layer_stack(depth)
        if any("vmap" in str(node.target) for node in module.graph.nodes):
            raise NoMatch("the graph has a vmap, which cannot be traced to ATen") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NoMatch(f"the graph cannot be traced to ATen operators: {first}") from error
    for old, new in zip(_placeholders(module), _placeholders(traced), strict=True):
        for key in ("tensor_dict", "grapharg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))
    traced.meta.update(module.meta)
    _plain(traced)
    return traced


def _fix_numbers(module: fx.GraphModule) -> None:
    """Make Dynamo capture again with the floats of the model itself as constants.

    With `dynamic=True` they are symbols, and a router with an unknown epsilon cannot be recognised.
    Floats that the caller passes stay symbols.
    """
    restart = False
    for node in _placeholders(module):
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        source = getattr(node.meta.get("grapharg"), "source", None)
        if isinstance(memo, torch.SymFloat) and not _passed(source):
            TensorifyState.specialize(str(expr_of(memo.node)))
            restart = True
    if restart:
        raise TensorifyScalarRestartAnalysis


def _passed(source: Any) -> bool:
    return isinstance(getattr(source, "base", source), LocalSource)


def _plain(traced: fx.GraphModule) -> None:
    """Normalises the trace: all casts are `_to_copy`; `detach` is restored (functionalisation makes
    it an alias, through which gradients would flow); assertions about metadata are removed."""
    for node in list(traced.graph.nodes):
        name = str(node.target)
        if "_assert_tensor_metadata" in name or _says_a_size_is_one(node):
            traced.graph.erase_node(node)
        elif name == "aten.alias.default" and _detaches(node):
            node.target = torch.ops.aten.detach.default
        elif name == "aten.copy.default":
            _written_over(node)
        elif name.startswith("aten.to."):
            source, result = node.args[0], node.meta["val"]
            operand = source.meta["val"]
            if (operand.dtype, operand.device) != (result.dtype, result.device):
                with traced.graph.inserting_before(node):
                    cast_node = traced.graph.call_function(
                        to_copy,
                        (source,),
                        {"dtype": result.dtype, "device": result.device},
                    )
                cast_node.meta = dict(node.meta)
                source = cast_node
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _says_a_size_is_one(node: fx.Node) -> bool:
    """Whether the node asserts size >= 0, as torch does for every size that depends on data."""
    if node.target is not assert_scalar:
        return False
    condition = node.args[0]
    if (
        not isinstance(condition, fx.Node)
        or condition.target is not operator.ge
        or condition.args[1] != 0
    ):
        return False
    size = condition.args[0]
    return isinstance(size, fx.Node) and size.target is torch.ops.aten.sym_size.int


def _written_over(node: fx.Node) -> None:
    """Replaces a functional `a.copy_(b)`, which has no gradient in PyTorch, by b in the shape and
    dtype of a."""
    destination, source = node.meta["val"], cast(fx.Node, node.args[1])
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.ops.aten.expand_as.default, (source, node.args[0]))
        new.meta = {**node.meta, "val": source.meta["val"].expand_as(destination)}
        if source.meta["val"].dtype != destination.dtype:
            new = node.graph.call_function(to_copy, (new,), {"dtype": destination.dtype})
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _fake(mode: FakeTensorMode, context: TracingContext, value: Any) -> Any:
    """An input in Dynamo's fake mode, with the symbols that Dynamo uses for its sizes; a Python
    float unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    contexts: Any = context.tensor_to_context
    symbolic = contexts.get(value)
    source = symbolic.tensor_source if symbolic else None
    return mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False)


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def static_inputs(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The parameters and buffers among the inputs, which keep their memory between calls, without
    buffers that the graph writes into, and without single floats, such as a temperature: proofs
    would rely on their values, and these are trained."""
    written = {
        node.args[0] for node in module.graph.nodes if node.target is torch.ops.aten.copy_.default
    }
    return {
        node: value.detach()
        for node, value in zip(_placeholders(module), inputs, strict=True)
        if isinstance(value, torch.Tensor)
        and node not in written
        and (value.ndim or not value.is_floating_point())
        and (STATIC in node.meta.get("tensor_dict", {}) or isinstance(value, torch.nn.Parameter))
    }


def _writes(node: fx.Node) -> bool:
    name = _name(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


class _Interpreter(fx.Interpreter):
    """Runs the graph with `x.data` as a `detach`, which functionalisation would lose."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _DATA in _name(target):
            return torch.detach(args[0])
        return super().call_function(target, args, kwargs)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _detaches(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph, or one traced from it, stops gradients."""
    stack = node.meta.get("source_fn_stack") or [("", "")]
    return any(word in _name(stack[-1][1]) for word in ("detach", _DATA))


def _functional(module: fx.GraphModule) -> Any:
    def run(*arguments: Any) -> Any:
        above = DispatchKeySet(DispatchKey.Functionalize)
        with (
            ExcludeDispatchKeyGuard(above),
            FunctionalTensorMode(pre_dispatch=True, export=True),
        ):
            wrapped = pytree.tree_map_only(
                torch.Tensor, FunctionalTensor.to_functional, list(arguments)
            )
            result = _Interpreter(module).run(*wrapped)
            written = [_written(argument) for argument in wrapped]
            result = pytree.tree_map_only(FunctionalTensor, _synced, result)
        for argument, new in zip(arguments, written, strict=True):
            if new is not None:
                argument.copy_(new)
        return result

    return run


def _synced(tensor: FunctionalTensor) -> torch.Tensor:
    sync(tensor)
    inner: torch.Tensor = from_functional_tensor(tensor.elem)
    return inner


def _written(argument: Any) -> torch.Tensor | None:
    """The new contents of an input that the graph wrote into; None where it did not. Raises NoMatch
    where its shape or strides changed."""
    if not isinstance(argument, FunctionalTensor):
        return None
    after = _synced(argument)
    if has_metadata_mutation(argument.elem):
        raise NoMatch("the graph changes the shape or strides of an input in place")
    changed = has_data_mutation(argument.elem)
    return after if changed else None
