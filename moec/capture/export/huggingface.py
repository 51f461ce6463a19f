"""Hugging Face experts: one opaque op per MoE layer, with the body of one expert as text.

transformers looks up experts implementations by name, and moec registers its own. It calls
`moec::experts(x[T, D], top_k_index[T, k], top_k_weights[T, k], params stacked over E, E, body) ->
y[T, D]`. The body is traced before the export from what the module does to the rows of one expert
(its `_apply_gate`, activation, biases, norm), so that a new activation needs no code here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.export import Dim as TorchDim

from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose
from moec.capture.export.autograd import autograd_inside
from moec.errors import CaptureError
from moec.ir.graph import Graph
from moec.ir.interpret.evaluate import run_graph
from moec.ir.text import parse, print_graph

NAME = "moec"


def _experts(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    params: list[torch.Tensor],
    num_experts: int,
    body: str,
) -> torch.Tensor:
    """y[t] = sum over s of top_k_weights[t, s] * body(hidden[t]; params of expert [t, s]).

    An id of `num_experts` or more is the sentinel of expert parallelism: it adds nothing.
    """
    graph = _body(body)
    total = torch.zeros_like(hidden)
    # unbound once, so that the gradient of a stack is written once
    slices = [p.unbind() for p in params]
    for expert in range(num_experts):
        token, slot = torch.where(top_k_index == expert)
        if not len(token):
            continue
        rows = run_graph(graph, [hidden[token], *(stack[expert] for stack in slices)])[0]
        weighted = rows * top_k_weights[token, slot, None]
        total.index_add_(0, token, weighted.to(total.dtype))
    return total


@lru_cache(maxsize=256)
def _body(text: str) -> Graph:
    return parse(text)


experts_op = torch.library.custom_op("moec::experts", _experts, mutates_args=())
experts_op.register_fake(lambda hidden, *rest: torch.empty_like(hidden))


@torch.library.custom_op("moec::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    params: list[torch.Tensor],
    num_experts: int,
    body: str,
) -> list[torch.Tensor]:
    """The gradients of hidden [T, D], top_k_weights [T, k], and each of params."""
    leaves = [t.detach().requires_grad_() for t in (hidden, top_k_weights, *params)]
    with autograd_inside():
        y = _experts(leaves[0], top_k_index, leaves[1], leaves[2:], num_experts, body)
        grads = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    return [g.clone() for g in grads]  # results of an operator share no memory


@experts_backward.register_fake
def _(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
    *rest: object,
) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in (hidden, weights, *params)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, index, weights, params, ctx.num_experts, ctx.body = inputs
    ctx.save_for_backward(hidden, index, weights, *params)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    hidden, index, weights, *params = ctx.saved_tensors
    grads = experts_backward(grad, hidden, index, weights, params, ctx.num_experts, ctx.body)
    return grads[0], None, grads[1], grads[2:], None, None


experts_op.register_autograd(_backward, setup_context=_setup)


class _OneExpert(torch.nn.Module):
    """What an experts module computes for rows of one expert, given that expert's slices."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = [experts]  # in a list: not a submodule, its weights are not captured

    def forward(self, x: torch.Tensor, params: list[torch.Tensor]) -> torch.Tensor:
        (module,) = self.experts
        rest = list(params)

        def linear(rows: torch.Tensor) -> torch.Tensor:
            weight = rest.pop(0)
            bias = rest.pop(0) if module.has_bias else None
            weight = weight.t() if module.is_transposed else weight
            return torch.nn.functional.linear(rows, weight, bias)

        rows = linear(x)
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = linear(rows)
        if module.has_post_expert_norm:
            names = [name for name, _ in module.post_expert_norm.named_parameters()]
            shared = dict(zip(names, rest, strict=True))
            rows = torch.func.functional_call(module.post_expert_norm, shared, (rows,))
        return rows


def is_experts(module: torch.nn.Module) -> bool:
    """Whether the module's class is decorated with `use_experts_implementation` of transformers."""
    return all(
        hasattr(module, name)
        for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    )


def stacked(experts: Any) -> list[torch.Tensor]:
    """The stacked params of an experts module, in the order in which `_OneExpert` takes them."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [first, "down_proj"]
    if experts.has_bias:
        names = [first, f"{first}_bias", "down_proj", "down_proj_bias"]
    params = [getattr(experts, name) for name in names]
    if experts.has_post_expert_norm:  # every expert reads the same norm
        norm_params = experts.post_expert_norm.parameters()
        params += [p.expand(experts.num_experts, *p.shape) for p in norm_params]
    return params


def body_of(experts: Any, name: str) -> Graph:
    """The graph of one expert: body(x[R, D]; its slices of the stacked params) -> [R, D]."""
    params = stacked(experts)
    width = params[0].shape[1 if experts.is_transposed else 2]
    rows = torch.empty(5, width, dtype=params[0].dtype)
    # Only shapes and strides matter; a stack may be distributed over ranks (DTensor).
    slices = [
        torch.empty_strided(p.shape[1:], p.stride()[1:], dtype=p.dtype, device=p.device)
        for p in params
    ]
    try:
        exported = torch.export.export(
            _OneExpert(experts),
            (rows, slices),
            dynamic_shapes=({0: TorchDim.AUTO}, [None] * len(slices)),
            strict=False,
        )
        program = to_program(decompose(exported), rename=_rows(exported), output_names=("y",))
    except Exception as error:
        raise CaptureError(
            f"{name}: one expert cannot be traced: {error}; if the class changes its experts' "
            "forward, register it without use_experts_implementation"
        ) from error
    graph = program.graph
    if graph.params:
        raise CaptureError(
            f"{name}: an expert reads {graph.params[0].name}, which is not stacked over the experts"
        )
    return Graph(graph.inputs[:1], graph.inputs[1:], graph.ops, graph.outputs, name="body")


def _rows(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Renames the one free size of a body to R."""
    return {str(name): "R" for name in exported.range_constraints}


_BODY = "moec_body"
"""The attribute of an experts module that holds the text of its body."""


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    result: torch.Tensor = experts_op(
        hidden_states,
        top_k_index,
        top_k_weights.reshape(top_k_index.shape),
        stacked(self),
        self.num_experts,
        getattr(self, _BODY),
    )
    return result


def switch_experts(model: torch.nn.Module) -> dict[int, tuple[Any, Any]]:
    """Make each decorated experts module of the model compute by one `moec::experts` call.

    Returns {id: (config, previous experts implementation)} for the configs that it changed. Raises
    CaptureError for experts that cannot be traced.
    """
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not modules:
        return {}
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    bodies = _bodies(modules)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    for module in modules.values():
        setattr(module, _BODY, bodies[id(module)])
    configs = {id(module.config): module.config for module in modules.values()}
    before = {key: (c, c._experts_implementation) for key, c in configs.items()}
    for config in configs.values():
        config._experts_implementation = NAME
    return before


@contextmanager
def experts_as_ops(model: torch.nn.Module) -> Iterator[None]:
    """`switch_experts` while open; on leaving, the previous implementations are restored."""
    before = switch_experts(model)
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation = implementation


def _bodies(modules: dict[str, Any]) -> dict[int, str]:
    """The body text of each experts module by id; equal modules share a trace."""
    texts: dict[tuple[Any, ...], str] = {}
    bodies: dict[int, str] = {}
    for name, module in modules.items():
        shapes = tuple((p.shape, p.dtype, p.stride()) for p in stacked(module))
        plain = tuple(
            sorted(
                (k, v)
                for k, v in vars(module).items()
                if isinstance(v, bool | int | float | str) and k != _BODY
            )
        )
        key = (type(module), shapes, plain, repr(getattr(module, "act_fn", None)))
        if key not in texts:
            texts[key] = print_graph(body_of(module, name))
        bodies[id(module)] = texts[key]
    return bodies
