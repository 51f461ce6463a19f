"""The backend: replaces MoE blocks in Dynamo's graph; Inductor or eager runs the rest.

    Dynamo's graph ─ trace ─▶ ATen ─ convert ─▶ Graph[ATEN] ─ recognise ─▶ Graph[MOE]
                               │                                              │ regions
          rest (Inductor) ◀─ an operator in place of each region ◀─ code ◀─────┘

Blocks are replaced before autograd sees the graph. Where gradients are needed, the replacing
operator defines its own, so that inference and training share one path, and aot_autograd handles
everything else. A graph with nothing else is run by `direct`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from moec.arguments import target_of
from moec.dynamo.code import Code, generate, is_constant
from moec.dynamo.graph.convert import convert, take_local_parts, with_parts
from moec.dynamo.graph.regions import Region, regions
from moec.dynamo.graph.trace import static_inputs, trace
from moec.dynamo.operators import SITES, BlockSite, register_site
from moec.dynamo.options import Options, parse
from moec.dynamo.record import RECORDER, Fallback
from moec.dynamo.skipped import watch
from moec.dynamo.training.gradients import IN_PYTORCH, Products
from moec.dynamo.training.trained_weights import (
    choice_tensors,
    gradient_barrier,
    mostly_trainable,
    needs_gradient,
    trainable_inputs,
)
from moec.errors import IRError, MoecError, NoMatch, SetupError, TargetError
from moec.passes.core.runner import run
from moec.passes.recognise import RecogniseExperts
from moec.pipeline import CANONICALISE, RECOGNISE
from moec.runtime.device.device import CPU, CUDA
from moec.target import cuda
from moec.target.cpu import CpuTarget
from moec.torch_private import (
    aot_autograd,
    dynamo_timed,
    make_boxed_func,
    min_cut_rematerialization_partition,
)

RECOGNITION = (*CANONICALISE.passes, *RECOGNISE.passes)

_UNRECOGNISED = (
    "the graph has a top-k and no experts were found in it: it may break between router and "
    "experts (TORCH_LOGS=graph_breaks); a Hugging Face model needs moec.prepare(model) first"
)


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend function, which `torch.compile(model, backend="moec", options=...)` calls with
    each graph.

    Raises UsageError for options that do not exist, and FallbackError under `strict`.
    """
    settings = parse(options, mode)
    watch(backend)
    with dynamo_timed("moec_backend"):
        inputs, parts = take_local_parts(module, inputs)
        sites, module, left = replace_blocks(module, inputs, settings)
    run = (direct(module) if sites else None) or compile_rest(module, inputs, settings.rest)
    RECORDER.add(compilations=1, blocks=len(sites))
    RECORDER.fall_back(left, strict=settings.strict)
    call = partial(with_parts(run, parts))  # a partial adds no Python call
    call.sites = sites  # type: ignore[attr-defined]  # they live as long as the graph
    return call


def replace_blocks(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options
) -> tuple[list[BlockSite], fx.GraphModule, list[Fallback]]:
    """(sites, graph that calls them, blocks left to PyTorch with their reasons). Without sites the
    graph is `module` itself, unchanged."""
    choices = _choices(module)
    if choices and all(_is_empty(node) for node in choices):
        return [], module, []  # an example without tokens: there is nothing to leave to PyTorch
    try:
        options, device = on_devices(options, devices_of(choices))
    except (NoMatch, TargetError) as why:
        return [], module, [Fallback("the graph", str(why))]
    hint = _UNRECOGNISED if choices else ""
    training = needs_gradient(inputs)
    try:
        traced = trace(module, inputs, training=training)
        learning = trainable_inputs(traced, inputs)
        static = static_inputs(traced, inputs)
        converted = convert(traced, static)
        pass_results = run(converted.program, RECOGNITION)
    except (NoMatch, MoecError, IRError) as why:
        return [], module, [Fallback("the graph", str(why))] if hint else []
    # An unrecognised router is no reason to leave its block to PyTorch: it becomes part of the
    # block.
    left = [
        Fallback(d.where, d.reason)
        for pass_result in pass_results
        for d in pass_result.declined
        if d.rule == RecogniseExperts.name
    ]
    sites: list[BlockSite] = []
    products = IN_PYTORCH if isinstance(options.target, CpuTarget) else ON_GPU
    codes: dict[str, Code] = {}
    for candidate in regions(converted, pass_results[-1].program):
        if not isinstance(candidate, Region):
            left.append(Fallback(candidate[0], str(candidate[1])))
            continue
        try:
            if training and (reason := gradient_barrier(traced, candidate)):
                raise NoMatch(reason)
            check_one_device(candidate)
            code = generate(candidate, options, codes)
        except (NoMatch, MoecError, IRError) as why:
            left.append(Fallback(candidate.where, str(why)))
            continue
        codes[code.key] = code
        trained = training and mostly_trainable(candidate.params, learning)
        params = _params(candidate, static)
        site = _site(candidate, code, [static[node] for node in params], products, device, trained)
        sites.append(site)
        _insert(traced, candidate, site, params, training)
    if not sites:
        if hint and not left:
            left.append(Fallback("the graph", hint))
        return [], module, left
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return sites, traced, left


def _params(region: Region, static: Mapping[fx.Node, torch.Tensor]) -> list[fx.Node]:
    """The params of the region, and then the ids and masks that the block was recognised by but
    that it does not read."""
    relied = (node for node in region.inside() if node in static and is_constant(static[node]))
    return list(dict.fromkeys((*region.params, *relied)))


def _site(
    region: Region,
    code: Code,
    weights: Sequence[torch.Tensor],
    products: Products,
    device: str,
    trained: bool,
) -> BlockSite:
    operands = [*region.inputs, *region.params]
    copied = [operands.index(node) for node in choice_tensors(region)]
    return register_site(
        *(region.where, code, products, device), trained=trained, params=weights, copied=copied
    )


def _insert(
    traced: fx.GraphModule,
    region: Region,
    site: BlockSite,
    params: Sequence[fx.Node],
    training: bool,
) -> None:
    """Replaces the region's output by a call of the site."""
    operators = torch.ops.moec
    with traced.graph.inserting_before(region.output):
        node = traced.graph.call_function(
            operators.block.default if training else operators.block_forward.default,
            (list(region.inputs), list(params), site.name),
        )
    node.meta = dict(region.output.meta)
    region.output.replace_all_uses_with(node)


def _choices(module: fx.GraphModule) -> list[fx.Node]:
    """The top-k nodes and experts calls, which indicate a router."""
    nodes = []
    for node in module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if name.endswith(("topk", "topk.default", "experts")):
            nodes.append(node)
    return nodes


def _is_empty(node: fx.Node) -> bool:
    first = example_of(node)
    # A symbolic size is not 0, because Dynamo specialises on 0.
    return first is not None and any(isinstance(size, int) and size == 0 for size in first.shape)


# ---- calls a graph of blocks and views directly, without AOTAutograd -----------------
# What AOTAutograd adds to a graph (gradients, writes into inputs, aliases) is not needed where
# there are no gradients and nothing but blocks and views. Its Python code takes longer than the
# kernels of a small layer, and a tenth of the time of one token in a large layer, whose weights
# have evicted that code from the caches.


def direct(module: fx.GraphModule) -> Callable[..., Any] | None:
    """A function that calls the graph's sites without dispatch, if the graph holds only blocks
    without gradients, views and arithmetic on sizes; else None."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copied = graph.node_copy(node, copies.__getitem__)
        size = isinstance(node.meta.get("val"), torch.SymInt | int)
        if node.op in ("placeholder", "output") or size:
            continue
        if node.target is torch.ops.moec.block_forward.default:
            inputs, params, name = copied.args
            copied.target, copied.args = SITES[cast(str, name)].run, (inputs, params)
        elif node.target is torch.ops.aten.view.default:
            copied.op, copied.target = "call_method", "view"
        else:
            return None
    forward: Callable[..., Any] = fx.GraphModule({}, graph).forward
    return forward


# ---- everything that is no MoE block: compiled by Inductor, or run operator by operator ---


Callee = Callable[..., Any]


def compile_rest(module: fx.GraphModule, inputs: Sequence[Any], how: str) -> Callee:
    """A function for the graph, by `how`: "inductor" or "eager". Raises UsageError where Inductor
    has no C++ compiler."""
    if how == "inductor":
        return _inductor(module, inputs)
    callee: Callee = aot_autograd(
        fw_compiler=_as_it_is, partition_fn=min_cut_rematerialization_partition
    )(module, inputs)
    return callee


def _as_it_is(module: fx.GraphModule, inputs: Sequence[Any]) -> Callee:
    callee: Callee = make_boxed_func(module.forward)
    return callee


def _inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callee:
    # Inductor takes long to import
    from moec.torch_private import InvalidCxxCompiler, compile_fx, get_cpp_compiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SetupError(
            "Inductor compiles what is no MoE block, and finds no C++ compiler: install g++ or "
            'clang++, or run the rest as it is with options={"rest": "eager"}'
        ) from error
    return cast(Callee, compile_fx(module, list(inputs)))


_BYTES = 16  # of which rows, in the memory that is read, are a multiple (torch's own check)


class GroupedMm(Products):
    """Products by `torch.nn.functional.grouped_mm`, without waiting for a routing.

    It takes bfloat16 on a GPU; other dtypes, and rows that are no multiple of 16 bytes, are
    computed expert by expert.
    """

    def product(self, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if not _takes(rows, w):
            return IN_PYTORCH.product(rows, ends, w, b)
        y = F.grouped_mm(rows, w.mT, offs=ends)
        if b is not None:
            y = y + b[_experts(ends, len(rows), len(w))]
        return _without_others(y, ends)

    def mixed(self, grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        if not _takes(grad, w):
            return IN_PYTORCH.mixed(grad, ends, w)
        return _without_others(F.grouped_mm(grad, w, offs=ends), ends)

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        if not _takes(rows, w):
            return IN_PYTORCH.outer(grad, rows, ends, w)
        if w.is_contiguous():
            return F.grouped_mm(grad.mT, rows, offs=ends)
        return F.grouped_mm(rows.mT, grad, offs=ends).mT


ON_GPU: Products = GroupedMm()


def _takes(rows: Tensor, w: Tensor) -> bool:
    multiple = all(size * w.element_size() % _BYTES == 0 for size in w.shape[1:])
    dense = w.is_contiguous() or w.mT.is_contiguous()
    return multiple and dense and len(rows) > 0 and rows.dtype == w.dtype == torch.bfloat16


def _experts(ends: Tensor, rows: int, experts: int) -> Tensor:
    """The expert of each row; of rows behind the last end the last."""
    numbers = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, numbers, right=True).clamp_max(experts - 1)


def _without_others(y: Tensor, ends: Tensor) -> Tensor:
    """y with zeros in rows behind the last end, which grouped_mm leaves as they are."""
    numbers = torch.arange(len(y), device=ends.device)
    return y.masked_fill((numbers >= ends[-1])[:, None], 0)


def example_of(node: fx.Node) -> torch.Tensor | None:
    """Dynamo's example of the node's first result, mostly a fake tensor."""
    example = node.meta.get("example_value")
    first = example[0] if isinstance(example, tuple) else example
    return first if isinstance(first, torch.Tensor) else None


def devices_of(nodes: Collection[fx.Node]) -> set[str]:
    """The devices of the nodes' results, by torch's names."""
    examples = (example_of(node) for node in nodes)
    return {str(example.device) for example in examples if example is not None}


def on_devices(options: Options, devices: Collection[str]) -> tuple[Options, str]:
    """The options with the target for tensors on these devices, and the device.

    Raises NoMatch for several devices, for one that no kernel is for, and for a target of another
    kind in the options; TargetError for a GPU that does not exist, or is too old.
    """
    if len(devices) > 1:
        names = " and ".join(sorted(devices))
        raise NoMatch(f"its tensors are on {names}: those of a block must be on one device")
    device = next(iter(devices), CPU)
    kind, _, index = device.partition(":")
    if kind not in (CPU, CUDA):
        raise NoMatch(
            f"its tensors are on {device}, and there are kernels for CPUs and NVIDIA GPUs"
        )
    target = options.target
    if target is None:
        target = target_of(CPU, run=True) if kind == CPU else cuda.of_gpu(int(index or 0))
    elif target.kind != kind:
        raise NoMatch(
            f"its tensors are on {device}, and the target {target.name!r} of the options is for "
            "another device: leave it out"
        )
    return replace(options, target=target), device


def check_one_device(region: Region) -> None:
    """Raises NoMatch where the tensors of a region are on two devices."""
    values = (node.meta.get("val") for node in (*region.inputs, *region.params))
    devices = {str(value.device) for value in values if isinstance(value, torch.Tensor)}
    if len(devices) > 1:
        raise NoMatch(f"its tensors are on {' and '.join(sorted(devices))}: it runs on one device")
