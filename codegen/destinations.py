"""Functions write results into memory of their caller, instead of memory of TVM's pool.

    main(x):     a = alloc_tensor(); kernel(x, a); return reshape(a)
    main(x, y):  a = reshape(y);     kernel(x, a); return reshape(a)

So the caller copies no result. `lower` selects the results; `in_destinations` rewrites the calls.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

ATTRIBUTE = "moec.destinations"
"""Attribute of a Relax function: for each argument that is memory of a result, the index of the
result and that of the argument."""

_ALLOCATION = tvm.ir.Op.get("relax.builtin.alloc_tensor")


def reshape(value: relax.Expr, shape: relax.ShapeExpr) -> relax.Expr:
    empty = any(isinstance(size, tirx.IntImm) and not size.value for size in shape.values)
    # To TVM's reshape, a 0 is the size that the value has at that axis.
    return (relax.op.memory.view if empty else relax.op.reshape)(value, shape)


def in_destinations(module: tvm.IRModule) -> tvm.IRModule:
    """The module with kernels that write into the memory of results. In it, calls of kernels are
    rewritten (`CallTIRRewrite`), and memory is not planned."""
    functions = {
        variable: _rewritten(function)
        if isinstance(function, relax.Function) and ATTRIBUTE in (function.attrs or {})
        else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _rewritten(function: relax.Function) -> relax.Function:
    bindings = relax.analysis.get_var2val(function)
    results = _value(function.body.body, bindings).fields
    memory = {}
    for result, argument in function.attrs[ATTRIBUTE]:
        allocated = _allocated(results[int(result)], bindings)
        memory[allocated] = function.params[int(argument)]
    blocks = [
        relax.BindingBlock([_binding(binding, memory) for binding in block.bindings])
        for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(
        function.params, body, function.ret_ty, function.is_pure, function.attrs
    ).without_attr(ATTRIBUTE)


def _binding(binding: Any, memory: dict[Any, relax.Var]) -> Any:
    if binding.var not in memory:
        return binding
    argument, shape = memory[binding.var], binding.value.args[0]
    return relax.VarBinding(binding.var, reshape(argument, shape))


def _allocated(result: relax.Expr, bindings: Any) -> relax.Var:
    """The variable of the allocation whose memory a result has."""
    variable = result
    while True:
        value = bindings[variable]
        if isinstance(value, relax.Call) and value.op == _ALLOCATION:
            return variable
        if isinstance(value, relax.TupleGetItem):
            variable = _value(value.tuple_value, bindings).fields[value.index]
        else:
            variable = value.args[0] if isinstance(value, relax.Call) else value


def _value(expression: relax.Expr, bindings: Any) -> relax.Expr:
    """The expression that a variable is bound to, however often it is renamed."""
    while isinstance(expression, relax.Var):
        expression = bindings[expression]
    return expression
