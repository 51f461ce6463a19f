"""Every private name of torch that moec uses, and what for.

    from moec.torch_private import pytree, schema_of

Private names move between versions of torch. Where the installed one lacks a name, its import, or
its use as an attribute of this module, raises MissingTorchName with one sentence; nothing else is
done without it, unless the caller has another way and says so.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moec.errors import MoecError

TESTED = "2.13 to 2.15"
"""Versions of torch; docs/install.md lists which tests pass with each."""


class MissingTorchName(MoecError):
    """The installed torch has no such name."""


@dataclass(frozen=True)
class PrivateName:
    """`path` in torch, and what moec cannot do without it. `read` is of an attribute of objects:
    moec's name is a function that reads it."""

    path: str
    use: str
    read: bool = False

    @property
    def attribute(self) -> str:
        return self.path.rpartition(".")[2]

    def missing(self) -> MissingTorchName:
        return MissingTorchName(
            f"torch {torch.__version__} has no {self.path}, without which moec cannot {self.use}: "
            f"install torch {TESTED}"
        )


_C, _DYNAMO, _SYMPY = "torch._C", "torch._dynamo", "torch.utils._sympy"
_SHAPES, _PROXY = "torch.fx.experimental.symbolic_shapes", "torch.fx.experimental.proxy_tensor"
_PROGRAM, _FUNCTIONAL = "torch.export.exported_program", "torch._subclasses.functional_tensor"

_TREES = "flatten nested arguments"
_SIZES = "read symbolic sizes"
_TRACES = "trace operators to core ATen"
_KINDS = "tell operators apart"
_BACKEND = "be a backend of torch.compile"
_REST = "leave the rest of a graph to torch.compile"
_GRADIENTS = "record gradients inside a custom operator"
_CONTENTS = "read what a module holds"

PRIVATE: Mapping[str, PrivateName] = {
    # nested values and modes
    "pytree": PrivateName("torch.utils._pytree", _TREES),
    "TorchDispatchMode": PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode", "watch operators of eager"
    ),
    "disable_current_modes": PrivateName(
        "torch.utils._python_dispatch._disable_current_modes", "compute constants during a trace"
    ),
    # symbolic sizes
    "ShapeEnv": PrivateName(f"{_SHAPES}.ShapeEnv", _SIZES),
    "evaluate_expr": PrivateName(f"{_SHAPES}.ShapeEnv.evaluate_expr", "answer branches on data"),
    "maybe_evaluate_static": PrivateName(
        f"{_SHAPES}.ShapeEnv._maybe_evaluate_static", "decide conditions on floats of sizes"
    ),
    "uninteresting_files": PrivateName(
        f"{_SHAPES}.uninteresting_files", "find the user's line of a guard"
    ),
    "free_unbacked_symbols": PrivateName(f"{_SHAPES}.free_unbacked_symbols", _SIZES),
    "GuardOnDataDependentSymNode": PrivateName(
        f"{_SHAPES}.GuardOnDataDependentSymNode", "see branches on data"
    ),
    "DimDynamic": PrivateName(f"{_SHAPES}.DimDynamic", "take local parts of weights"),
    "StatefulSymbolicContext": PrivateName(
        f"{_SHAPES}.StatefulSymbolicContext", "take local parts of weights"
    ),
    "symbolic_config": PrivateName("torch.fx.experimental._config", "keep equal sizes apart"),
    "handle_sym_dispatch": PrivateName(
        f"{_PROXY}.handle_sym_dispatch", "see where arithmetic on sizes is defined"
    ),
    "fake_sym_int": PrivateName(
        "torch._subclasses.fake_tensor.SymInt", "keep conditions on floats of sizes symbolic"
    ),
    "bound_sympy": PrivateName(f"{_SYMPY}.value_ranges.bound_sympy", _SIZES),
    "ToFloat": PrivateName(f"{_SYMPY}.functions.ToFloat", _SIZES),
    "Max": PrivateName(f"{_SYMPY}.functions.Max", _SIZES),
    "Min": PrivateName(f"{_SYMPY}.functions.Min", _SIZES),
    "check": PrivateName("torch._check", "tell torch.export what holds of a count"),
    "expr_of": PrivateName("torch.fx.experimental.sym_node.SymNode._expr", _SIZES, read=True),
    # traces
    "CapturedTraceback": PrivateName(
        "torch.fx.proxy.CapturedTraceback", "record the user's lines of an export"
    ),
    "python_function": PrivateName(
        "torch.jit.ScriptFunction._torchdynamo_inline", "export a scripted function", read=True
    ),
    "plain_setup_context": PrivateName(
        "torch.autograd.function._SingleLevelFunction.setup_context",
        "export a custom autograd function",
    ),
    "parse_to": PrivateName(f"{_C}._nn._parse_to", "export a module that casts its parts"),
    "FakeTensor": PrivateName("torch._subclasses.fake_tensor.FakeTensor", "follow data in a trace"),
    "FakeTensorMode": PrivateName("torch._subclasses.fake_tensor.FakeTensorMode", _TRACES),
    "FunctionalTensor": PrivateName(f"{_FUNCTIONAL}.FunctionalTensor", _TRACES),
    "FunctionalTensorMode": PrivateName(f"{_FUNCTIONAL}.FunctionalTensorMode", _TRACES),
    "make_fx": PrivateName(f"{_PROXY}.make_fx", _TRACES),
    "extract_tensor_metadata": PrivateName(f"{_PROXY}._extract_tensor_metadata", _TRACES),
    "new_patcher": PrivateName("torch.fx._symbolic_trace._new_patcher", _TRACES),
    "lazy_graph_modules": PrivateName(
        "torch.fx._lazy_graph_module._use_lazy_graph_module", _TRACES
    ),
    "enable_python_dispatcher": PrivateName(
        "torch._dispatch.python.enable_python_dispatcher", _TRACES
    ),
    "split_decompositions": PrivateName(
        f"{_PROGRAM}._split_decomp_table_to_cia_and_python_decomp", _TRACES
    ),
    "fake_mode_of": PrivateName(f"{_PROGRAM}._detect_fake_mode_from_gm", _TRACES),
    "override_composite": PrivateName(f"{_PROGRAM}._override_composite_implicit_decomp", _TRACES),
    "update_program": PrivateName("torch.export.ExportedProgram._update", "edit an export"),
    "sync": PrivateName("torch._sync", _TRACES),
    "from_functional_tensor": PrivateName("torch._from_functional_tensor", _TRACES),
    "has_metadata_mutation": PrivateName("torch._functionalize_has_metadata_mutation", _TRACES),
    "has_data_mutation": PrivateName("torch._functionalize_has_data_mutation", _TRACES),
    "layer_stack_depth": PrivateName(f"{_C}._functorch.get_dynamic_layer_stack_depth", _TRACES),
    "undo_layer_stack": PrivateName(
        f"{_C}._functorch.pop_dynamic_layer_stack_and_undo_to_depth", _TRACES
    ),
    # operators
    "OpOverload": PrivateName("torch._ops.OpOverload", _KINDS),
    "HigherOrderOperator": PrivateName("torch._ops.HigherOrderOperator", _KINDS),
    "schema_of": PrivateName("torch._ops.OpOverload._schema", "name operands", read=True),
    "overload_name_of": PrivateName("torch._ops.OpOverload._overloadname", _KINDS, read=True),
    "registrations_of": PrivateName(f"{_C}._dispatch_get_registrations_for_dispatch_key", _TRACES),
    "has_kernel_for": PrivateName(f"{_C}._dispatch_has_kernel_for_dispatch_key", _TRACES),
    "assert_scalar": PrivateName("torch.ops.aten._assert_scalar.default", _TRACES),
    "cdist_forward": PrivateName("torch.ops.aten._cdist_forward.default", _TRACES),
    "fft_of_complex": PrivateName("torch.ops.aten._fft_c2c.default", _TRACES),
    "fft_of_real": PrivateName("torch.ops.aten._fft_r2c.default", _TRACES),
    "fft_to_real": PrivateName("torch.ops.aten._fft_c2r.default", _TRACES),
    "local_scalar_dense": PrivateName("torch.ops.aten._local_scalar_dense.default", _TRACES),
    "batch_norm_no_training": PrivateName(
        "torch.ops.aten._native_batch_norm_legit_no_training.default", _TRACES
    ),
    "instance_norm": PrivateName("torch.ops.aten._native_batch_norm_legit.no_stats", _TRACES),
    "adaptive_avg_pool2d": PrivateName("torch.ops.aten._adaptive_avg_pool2d.default", _TRACES),
    "embedding_bag": PrivateName("torch.ops.aten._embedding_bag_forward_only.default", _TRACES),
    "training_bag": PrivateName("torch.ops.aten._embedding_bag.default", _TRACES),
    "get_decompositions": PrivateName("torch._decomp.get_decompositions", _TRACES),
    "safe_softmax": PrivateName("torch.ops.aten._safe_softmax", "run attention with masks"),
    "to_copy": PrivateName("torch.ops.aten._to_copy.default", _TRACES),
    # dispatch and autograd
    "DispatchKey": PrivateName(f"{_C}.DispatchKey", _GRADIENTS),
    "DispatchKeySet": PrivateName(f"{_C}.DispatchKeySet", _TRACES),
    "ForceDispatchKeyGuard": PrivateName(f"{_C}._ForceDispatchKeyGuard", _GRADIENTS),
    "ExcludeDispatchKeyGuard": PrivateName(f"{_C}._ExcludeDispatchKeyGuard", _TRACES),
    "excluded_keys": PrivateName(f"{_C}._dispatch_tls_local_exclude_set", _GRADIENTS),
    "included_keys": PrivateName(f"{_C}._dispatch_tls_local_include_set", _GRADIENTS),
    "set_grad_enabled": PrivateName(f"{_C}._set_grad_enabled", "read the grad mode of a graph"),
    "version_of": PrivateName("torch.Tensor._version", "see that a buffer changed", read=True),
    "address_of": PrivateName("torch.UntypedStorage._cdata", "tell views apart", read=True),
    # modules
    "parameters_of": PrivateName("torch.nn.Module._parameters", _CONTENTS, read=True),
    "buffers_of": PrivateName("torch.nn.Module._buffers", _CONTENTS, read=True),
    "passing_buffers_of": PrivateName(
        "torch.nn.Module._non_persistent_buffers_set", _CONTENTS, read=True
    ),
    "children_of": PrivateName("torch.nn.Module._modules", _CONTENTS, read=True),
    "hooks_of": PrivateName("torch.nn.Module._forward_hooks", _CONTENTS, read=True),
    "pre_hooks_of": PrivateName("torch.nn.Module._forward_pre_hooks", _CONTENTS, read=True),
    # torch.compile
    "dynamo": PrivateName(_DYNAMO, _BACKEND),
    "dynamo_config": PrivateName(f"{_DYNAMO}.config", "export without a cache of fake tensors"),
    "dynamo_timed": PrivateName(f"{_DYNAMO}.utils.dynamo_timed", _BACKEND),
    "dynamo_source_of": PrivateName("torch.fx.Node._dynamo_source", _BACKEND, read=True),
    "register_backend": PrivateName(f"{_DYNAMO}.register_backend", _BACKEND),
    "ConstantSource": PrivateName(f"{_DYNAMO}.source.ConstantSource", _BACKEND),
    "LocalSource": PrivateName(f"{_DYNAMO}.source.LocalSource", _BACKEND),
    "TensorifyState": PrivateName(f"{_DYNAMO}.symbolic_convert.TensorifyState", _BACKEND),
    "TensorifyScalarRestartAnalysis": PrivateName(
        f"{_DYNAMO}.exc.TensorifyScalarRestartAnalysis", _BACKEND
    ),
    "TracingContext": PrivateName("torch._guards.TracingContext", _BACKEND),
    "aot_autograd": PrivateName(f"{_DYNAMO}.backends.common.aot_autograd", _REST),
    "make_boxed_func": PrivateName("torch._functorch._aot_autograd.utils.make_boxed_func", _REST),
    "min_cut_rematerialization_partition": PrivateName(
        "torch._functorch.partitioners.min_cut_rematerialization_partition", _REST
    ),
    "InvalidCxxCompiler": PrivateName("torch._inductor.exc.InvalidCxxCompiler", _REST),
    "compile_fx": PrivateName("torch._inductor.compile_fx.compile_fx", _REST),
    "get_cpp_compiler": PrivateName("torch._inductor.cpp_builder.get_cpp_compiler", _REST),
}


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"moec.torch_private has no {name}")
    private = PRIVATE[name]
    return _reader(private) if private.read else _resolved(private, private.path)


def place(name: str) -> tuple[Any, str]:
    """What has the name in torch as an attribute, and the attribute: to replace it."""
    private = PRIVATE[name]
    _resolved(private, private.path)
    return _resolved(private, private.path.rpartition(".")[0]), private.attribute


def _resolved(private: PrivateName, path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        raise private.missing() from None


def _reader(private: PrivateName) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            return getattr(value, private.attribute)
        except AttributeError:
            raise private.missing() from None

    return read
