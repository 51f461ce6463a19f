"""The backend for CPUs: a kernel for each spec, compiled by LLVM and linked by a C compiler."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import IRModule
from tvm.tirx import PrimFunc

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cpu import compressed, dense, grouped, mixed, quantised, quantised_dense
from moec.codegen.backends.cpu.slots import SlotArguments
from moec.codegen.build import compile_module
from moec.codegen.cpu.attention.append import append
from moec.codegen.cpu.attention.attention import attention
from moec.codegen.cpu.attention.linear_attention import linear_attention
from moec.codegen.cpu.link import linked, linker_for
from moec.codegen.cpu.norm import norm
from moec.codegen.cpu.routing.dispatch import combine, dispatch
from moec.codegen.cpu.routing.gate import gate
from moec.codegen.cpu.routing.route import route
from moec.codegen.cpu.routing.zero_experts import zero_experts
from moec.codegen.loop_kernel import write
from moec.codegen.rules import RULES
from moec.codegen.specs.attention import AppendSpec, AttentionSpec, LinearAttentionSpec
from moec.codegen.specs.norm import NormSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, GateSpec, RouteSpec, ZeroSpec
from moec.runtime.package import BuiltLibrary
from moec.target.cpu import CpuTarget


def _library(
    modules: Mapping[str, IRModule], target: CpuTarget, opt_level: int, store: Store | None
) -> BuiltLibrary:
    module = modules[target.name]
    return BuiltLibrary(linked(compile_module(module, target, opt_level, store), target))


def _dispatch(spec: DispatchSpec, target: CpuTarget, name: str) -> PrimFunc:
    return dispatch(spec.num_experts, spec.top_k, name)


def _combine(spec: CombineSpec, target: CpuTarget, name: str) -> PrimFunc:
    return combine(
        target,
        spec.num_experts,
        spec.top_k,
        spec.width,
        spec.out,
        spec.rows,
        spec.weights,
        spec.addend,
        name,
    )


def _zero_experts(spec: ZeroSpec, target: CpuTarget, name: str) -> PrimFunc:
    return zero_experts(target, spec, name)


CPU = Backend(
    kind="cpu",
    rules=(
        *compressed.RULES,
        *dense.RULES,
        *grouped.RULES,
        *mixed.RULES,
        *quantised.RULES,
        *quantised_dense.RULES,
        *RULES,
    ),
    kernels={
        AppendSpec: append,
        AttentionSpec: attention,
        CombineSpec: _combine,
        DispatchSpec: _dispatch,
        GateSpec: gate,
        LinearAttentionSpec: linear_attention,
        NormSpec: norm,
        RouteSpec: route,
        ZeroSpec: _zero_experts,
    },
    loop=write,
    library=_library,
    ready=linker_for,
    index_checks=True,
    slots=SlotArguments,
)
