"""Replaces the linear attention of transformers by one op that is valid at all lengths.

transformers falls back to Python loops over chunks or positions; a graph would hold as many
iterations as the example needs. It decorates these functions with the name of an optional kernel
that may replace them (`use_kernel_func_from_hub_with_fallback`). During an export moec acts as that
kernel: each function calls `moec::linear_attention`. A function is replaced only if it agrees on
random inputs with what moec computes for its kernel name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.nn import functional

from moec.capture.intercept.interceptor import Handler
from moec.errors import CaptureError
from moec.ir.ops.dense.linear_attention import recurrence

OWN = {"moec.linear_attention.default": "nn.linear_attention"}
"""Operators in the export, with the ops of the IR that they become."""


@torch.library.custom_op("moec::linear_attention", mutates_args=())
def linear_attention_op(
    tensors: list[torch.Tensor],
    rest: list[torch.Tensor],
    rated: bool,
    delta: bool,
    started: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nn.linear_attention of [q, k, v, decay] and the optional tensors that the flags announce."""
    flags = {"rates": rated, "beta": delta, "start": started}
    names = (name for name, flag in flags.items() if flag)
    return recurrence(*tensors, **dict(zip(names, rest, strict=True)))


@linear_attention_op.register_fake
def _(tensors: list[torch.Tensor], *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    _, k, v, _ = tensors
    return torch.empty_like(v), v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


Arguments = Mapping[str, Any]
Scan = Callable[[Arguments], tuple[torch.Tensor, torch.Tensor]]


def carry(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rates: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nn.linear_attention in float32, as an operator that torch.export keeps: (y, last state)."""
    optional = (rates, beta, start)
    rest = [x.float() for x in optional if x is not None]
    required = [x.float() for x in (q, k, v, decay)]
    y, end = linear_attention_op(required, rest, *(x is not None for x in optional))
    return y, end


def _delta_rule(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, S, G, Dk], v [B, S, H, Dv], g [B, S, H] or [B, S, H, Dk], beta [B, S, H]."""
    q, k = a["query"].float(), a["key"].float()
    if a["use_qk_l2norm_in_kernel"]:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    y, end = carry(q, k, a["value"], a["g"], beta=a["beta"], start=a["initial_state"])
    return y.to(a["query"].dtype), end


def _mamba2(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N]; states [B, H, P, N]."""
    x, dt, start = a["hidden_states"].float(), a["dt"], a["initial_states"]
    if a["dt_bias"] is not None:
        dt = dt + a["dt_bias"].to(dt.dtype)
    if a["dt_softplus"]:
        dt = functional.softplus(dt)
    dt = dt.clamp(*a["dt_limit"]).float()
    start = None if start is None else start.transpose(2, 3)
    y, end = carry(a["C"], a["B"], x * dt[..., None], a["A"].float() * dt, start=start)
    if a["D"] is not None:
        y = y + a["D"][:, None] * x
    return y, end.transpose(2, 3)


def _mamba(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """x, dt, z [B, D, S], A [D, N], B and C [B, N, S]; states [B, D, N]."""
    x, dt, dtype = a["hidden_states"], a["dt"], a["hidden_states"].dtype
    if a["delta_bias"] is not None:
        dt = dt + a["delta_bias"].to(dt.dtype)[:, None]
    if a["delta_softplus"]:
        dt = functional.softplus(dt)
    q, k, v, decay = (x.float().mT[:, :, None] for x in (a["C"], a["B"], dt * x.float(), dt))
    y, end = carry(q, k, v, decay, rates=a["A"].mT[None])
    y = y[:, :, 0].mT.to(dtype)
    if a["D"] is not None:
        y = y + x * a["D"][:, None]
    if a["z"] is not None:
        y = y * functional.silu(a["z"])
    return y, end[:, 0].mT


@dataclass(frozen=True)
class _ScanKernel:
    """A linear-attention kernel of transformers, as moec computes it.

    `state` is the argument that requests the last state; `example` maps each tensor argument to its
    axes, one letter a size (`_SIZES`); `options` are the other arguments that `scan` reads.
    """

    scan: Scan
    state: str
    example: Mapping[str, str]
    options: Mapping[str, Any]


_RULE = {"query": "bsgk", "key": "bsgk", "value": "bshv", "beta": "bsh", "initial_state": "bhkv"}
_NORMED = {"use_qk_l2norm_in_kernel": True}
_GATED = _ScanKernel(_delta_rule, "output_final_state", {**_RULE, "g": "bsh"}, _NORMED)
_CHANNELS = {**{name: axes.replace("g", "h") for name, axes in _RULE.items()}, "g": "bshk"}
_KIMI = _ScanKernel(_delta_rule, "output_final_state", _CHANNELS, _NORMED)
_MAMBA2 = _ScanKernel(
    _mamba2,
    "return_final_states",
    {
        "hidden_states": "bshv",
        "dt": "bsh",
        "A": "h",
        "B": "bsgk",
        "C": "bsgk",
        "D": "h",
        "dt_bias": "h",
        "initial_states": "bhvk",
    },
    {"dt_softplus": True, "dt_limit": (0.1, 2.0), "chunk_size": 8},
)
_MAMBA = _ScanKernel(
    _mamba,
    "return_last_state",
    {
        "hidden_states": "bvs",
        "dt": "bvs",
        "A": "vk",
        "B": "bks",
        "C": "bks",
        "D": "v",
        "z": "bvs",
        "delta_bias": "v",
    },
    {"delta_softplus": True},
)
_SCAN_KERNELS = {
    "chunk_gated_delta_rule": _GATED,
    "fused_recurrent_gated_delta_rule": _GATED,
    "chunk_kda": _KIMI,
    "fused_recurrent_kda": _KIMI,
    "mamba_chunk_scan_combined": _MAMBA2,
    "selective_scan_fn": _MAMBA,
}
_IGNORED = {"chunk_size", "use_mambapy", "use_associative_scan"}
"""Arguments that affect how the result is computed, not its value."""
_PACKED = ("cu_seqlens", "seq_idx")
"""Arguments for sequences packed into one, which are refused if given; other arguments that reach
**kwargs are ignored."""
_SIZES = {"b": 2, "s": 19, "g": 2, "h": 4, "k": 5, "v": 3}
_LOGARITHMS = {"g", "A"}
_DECORATED = {"torch_function", "func_name"}
"""The closure variables of a function that is decorated with a kernel's name."""


def kernel_name(function: Any) -> str | None:
    """The name of the kernel that transformers would use instead of `function`, or None."""
    while function is not None:
        if inspect.isfunction(function) and _DECORATED <= {*function.__code__.co_freevars}:
            return str(inspect.getclosurevars(function).nonlocals["func_name"])
        function = getattr(function, "__wrapped__", None)
    return None


def _spelled(function: Any, kernel: _ScanKernel) -> Callable[..., Any]:
    """The function with its loop as one op. The result raises CaptureError where it is called with
    an argument that `kernel` does not read."""
    signature = inspect.signature(function)
    readable = {*kernel.example, *kernel.options, kernel.state, *_IGNORED, "kwargs"}

    @wraps(function)
    def scan(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, value in (*arguments.items(), *arguments.get("kwargs", {}).items()):
            default = signature.parameters[name].default if name in arguments else None
            unread = name in _PACKED or (name in arguments and name not in readable)
            if unread and value is not default:
                raise CaptureError(
                    f"{function.__name__} is called with {name}, which moec does not know: call "
                    "the model without it"
                )
        y, end = kernel.scan(arguments)
        if kernel.scan is _delta_rule:
            return y, end if arguments[kernel.state] else None
        return (y, end) if arguments[kernel.state] else y

    return scan


def _agrees(function: Any, kernel: _ScanKernel) -> bool:
    """Whether a function equals `kernel.scan` on random inputs."""
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {kernel.state: True, **kernel.options}
    for name, axes in kernel.example.items():
        x = torch.randn([_SIZES[axis] for axis in axes], generator=generator) * 0.5
        arguments[name] = -x.abs() if name in _LOGARITHMS else x
    parameters = inspect.signature(function).parameters
    arguments = {name: x for name, x in arguments.items() if name in parameters}
    try:
        pairs = zip(function(**arguments), _spelled(function, kernel)(**arguments), strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-4) for a, b in pairs)
    except (RuntimeError, TypeError, KeyError, ValueError):
        return False


def scan_handlers(model: torch.nn.Module) -> Iterator[Handler]:
    """The linear attention of the model's classes calls `moec::linear_attention`. A function that
    does not compute what the kernel of its name computes stays."""
    for name in {c.__module__ for module in model.modules() for c in type(module).__mro__}:
        source = sys.modules.get(name)
        for key, value in list(vars(source).items()) if source else ():
            named = kernel_name(value) if inspect.isfunction(value) else None
            kernel = _SCAN_KERNELS.get(named or "")
            if kernel is not None and _agrees(value, kernel):
                yield Handler(source, key, _spelled(value, kernel))
