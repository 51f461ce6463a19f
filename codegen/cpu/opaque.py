"""Hides bound integers from TVM's simplifier.

The simplifier substitutes the value of a bound variable wherever it occurs, recursively, tries its
rules for comparisons on the result, and restores the variables. Kernels here bind each intermediate
result, and the trees from the number of rows to an address became so large that nine tenths of the
time of compiling products was spent there.

    x = a + b      becomes      x = moec_number_64(a + b)

The call returns its argument. LLVM inlines it, and needs no such trees for its simplifications.

TVM's code generator simplifies once more, and looks through the arguments of calls: most of the
time of a product over sorted rows was spent there. So the last pass writes each number to memory,

    n[0] = a + b; x = n[0]

and LLVM's first pass makes it a register again: the machine code is the same.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.tirx import (
    AllocBuffer,
    AttrStmt,
    Bind,
    BufferLoad,
    BufferStore,
    For,
    IfThenElse,
    IntImm,
    PrimFunc,
    SeqStmt,
    Stmt,
    Var,
)
from tvm.tirx.analysis import undefined_vars
from tvm_ffi.structural import structural_map

from moec.codegen.cpu.frame import IMPORT

_BITS = {"bool": 1, "int32": 32, "int64": 64}
_INTEGERS = ("moec_number_32", "moec_number_64")
_CALL_EXTERN = tvm.ir.Op.get("tirx.call_extern")
_TEXT = "".join(
    f"define linkonce_odr i{bits} @moec_number_{bits}(i{bits} %x) alwaysinline {{\n"
    f"  ret i{bits} %x\n"
    "}\n"
    for bits in _BITS.values()
)


def opaque(function: PrimFunc, module: tvm.IRModule, context: object) -> PrimFunc:
    """The function with its bound integers and conditions hidden from TVM's simplifier; LLVM
    still sees through them."""
    body = _hide_in(function.body, _sizes(function.body))
    if body.same_as(function.body):
        return function
    statement = AttrStmt(tirx.const(0, "int32"), IMPORT, tvm.ir.StringImm(_TEXT), body)
    return function.with_body(statement)


def in_memory(function: PrimFunc, module: tvm.IRModule, context: object) -> PrimFunc:
    """The function with the integers that `opaque` hid in memory, out of the sight of TVM's code
    generator."""
    return function.with_body(structural_map(function.body, (SeqStmt, _with_stores)))


def _with_stores(sequence: SeqStmt) -> SeqStmt:
    parts: list[Stmt] = []
    for part in sequence.seq:
        if isinstance(part, Bind) and (number := _hidden(part.value)) is not None:
            buffer = tirx.decl_buffer((1,), str(part.var.ty.dtype), name="number")
            load = Bind(part.var, BufferLoad(buffer, [0]))
            parts += [AllocBuffer(buffer), BufferStore(buffer, number, [0]), load]
        else:
            parts.append(part)
    return SeqStmt(parts)


def _hidden(value: tirx.Expr) -> tirx.Expr | None:
    """The argument of a call that hides an integer; None for all else. Conditions are not deep."""
    if isinstance(value, tvm.ir.Call) and value.op.same_as(_CALL_EXTERN):
        name, *arguments = value.args
        if isinstance(name, tvm.ir.StringImm) and name.value in _INTEGERS:
            return arguments[0]
    return None


def _hide_in(s: Stmt, sizes: set[Var]) -> Stmt:
    match s:
        case SeqStmt():
            parts = [_hide_in(part, sizes) for part in s.seq]
            same = all(new.same_as(old) for new, old in zip(parts, s.seq, strict=True))
            return s if same else SeqStmt(parts)
        case AttrStmt():
            body = _hide_in(s.body, sizes)
            return s if body.same_as(s.body) else AttrStmt(s.node, s.attr_key, s.value, body)
        case For():
            body = _hide_in(s.body, sizes)
            if body.same_as(s.body):
                return s
            return For(s.loop_var, s.min, s.extent, s.kind, body, s.thread_binding, s.annotations)
        case IfThenElse():
            then = _hide_in(s.then_case, sizes)
            other = None if s.else_case is None else _hide_in(s.else_case, sizes)
            return IfThenElse(s.condition, then, other)
        case Bind() if s.var not in sizes and not isinstance(s.value, IntImm | Var):
            dtype = str(s.var.ty.dtype)
            if dtype in _BITS:
                return Bind(s.var, tirx.call_extern(dtype, f"moec_number_{_BITS[dtype]}", s.value))
    return s


def _sizes(body: Stmt) -> set[Var]:
    """The variables that buffers' sizes depend on. They must stay visible: TVM may move an
    allocation before the statement that binds a hidden variable."""
    bound: dict[Var, tirx.Expr] = {}
    variables: list[Var] = []

    def visit(s: Stmt) -> None:
        match s:
            case SeqStmt():
                for part in s.seq:
                    visit(part)
            case AttrStmt() | For():
                visit(s.body)
            case IfThenElse():
                visit(s.then_case)
                if s.else_case is not None:
                    visit(s.else_case)
            case Bind():
                bound[s.var] = s.value
            case AllocBuffer():
                for size in s.buffer.shape:
                    variables.extend(undefined_vars(size))

    visit(body)
    sizes: set[Var] = set()
    while variables:
        var = variables.pop()
        if var in bound and var not in sizes:
            sizes.add(var)
            variables.extend(undefined_vars(bound[var]))
    return sizes
