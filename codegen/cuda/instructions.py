"""PTX instructions and CUDA functions that kernels use, by names and Python arguments.

TVM makes of each PTX instruction one function around one `asm volatile`. What stands here is all
that kernels use, and all that the emulator of tests/cuda_emulator implements.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

WARP = 32
_ALL_LANES = T.uint32(0xFFFFFFFF)
_MMA = {"bfloat16": "bf16", "float16": "f16"}


def ptx(instruction: str, *operands: Expr | int) -> None:
    """One PTX instruction, destinations first."""
    T.evaluate(T.ptx[instruction](*operands))


def barrier() -> None:
    """All threads of the block arrive, and see each other's shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


def warp_barrier() -> None:
    T.evaluate(T.call_extern("int32", "__syncwarp"))


# ---- copies from global to shared memory, 16 bytes each --------------------------------


def copy_async(to: Expr, source: Expr, size: Expr | None = None) -> None:
    """16 bytes; where `size` is given only so many are read, and zeros follow them."""
    operands = (to, source, 16) if size is None else (to, source, 16, size)
    ptx("cp.async.cg.shared.global", *operands)


def commit_copies() -> None:
    """The copies since the last commit are one group."""
    ptx("cp.async.commit_group")


def wait_copies(groups: int) -> None:
    """Until at most `groups` of this thread's latest groups are still open."""
    ptx("cp.async.wait_group", groups)


# ---- matrix fragments of a warp --------------------------------------------------------


def load_fragments(registers: Sequence[Expr], row: Expr) -> None:
    """Four matrices 8x8 of 16 bits; lane l gives the address of row l % 8 of matrix l / 8."""
    ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, row)


def multiply(dtype: str, sums: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """sums[16, 8] float32 += a[16, 16] @ b[8, 16]^T of bfloat16 or float16."""
    name = _MMA[dtype]
    ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32", *sums, *a, *b, *sums)


def round_pair(dtype: str, word: Expr, low: Expr, high: Expr) -> None:
    """Two float32 -> a uint32 of two bfloat16 or float16."""
    ptx(f"cvt.rn.{_MMA[dtype]}x2.f32", word, high, low)  # the high half comes first


# ---- values of all lanes of a warp -----------------------------------------------------


def shuffle_xor(value: Expr, mask: int) -> Expr:
    """The float32 value of the lane whose number differs in these bits."""
    return T.bind(T.call_extern("float32", "__shfl_xor_sync", _ALL_LANES, value, T.int32(mask)))


def warp_sum(value: Expr) -> Expr:
    """The sum of all lanes' float32, by halves: the same order every time."""
    for step in (16, 8, 4, 2, 1):
        value = T.bind(value + shuffle_xor(value, step))
    return value


def warp_greatest(value: Expr) -> Expr:
    """The greatest float32 of all lanes; NaN counts only where all are."""
    for step in (16, 8, 4, 2, 1):
        value = T.bind(T.call_extern("float32", "fmaxf", value, shuffle_xor(value, step)))
    return value


def warp_max(value: Expr) -> Expr:
    """Of int32, by one instruction."""
    return T.bind(T.call_extern("int32", "__reduce_max_sync", _ALL_LANES, value))


def warp_min(value: Expr) -> Expr:
    """Of int32, by one instruction."""
    return T.bind(T.call_extern("int32", "__reduce_min_sync", _ALL_LANES, value))


def ballot(condition: Expr) -> Expr:
    """uint32: the lanes where the condition holds."""
    return T.bind(T.call_extern("uint32", "__ballot_sync", _ALL_LANES, condition))


def match(value: Expr) -> Expr:
    """uint32: the lanes that have the same int32."""
    return T.bind(T.call_extern("uint32", "__match_any_sync", _ALL_LANES, value))


def count_bits(mask: Expr) -> Expr:
    return T.bind(T.call_extern("int32", "__popc", mask))


# ---- scalars ---------------------------------------------------------------------------


def add_atomically(buffer: Buffer, index: Expr, value: int) -> None:
    T.evaluate(T.call_extern("int32", "atomicAdd", buffer.ptr_to([index]), T.int32(value)))


def exp(x: Expr) -> Expr:
    """To 2 ulp; TVM's own is `__expf`, which is not."""
    return T.call_extern("float32", "expf", x)


def erf(x: Expr) -> Expr:
    return T.call_extern("float32", "erff", x)


def tanh(x: Expr) -> Expr:
    return T.call_extern("float32", "tanhf", x)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c, rounded once."""
    return T.call_extern("float32", "fmaf", a, b, c)
