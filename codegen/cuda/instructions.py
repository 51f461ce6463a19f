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


def load_past_cache(words: Sequence[Expr], source: Expr) -> None:
    """Four uint32: 16 bytes that nobody writes meanwhile, not kept in the L1 cache."""
    ptx("ld.global.nc.L1::no_allocate.v4.u32", *words, source)


def load_shared(floats: Sequence[Expr], source: Expr) -> None:
    """Four float32: 16 bytes of shared memory."""
    ptx("ld.shared.v4.f32", *floats, source)


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


def fma_pair(target: Expr, a: Expr, b: Expr, c: Expr) -> None:
    """target = a * b + c of two float16 in each uint32, rounded once."""
    ptx("fma.rn.f16x2", target, a, b, c)


# ---- sm_90a: barriers that copies complete, TMA, products of four warps ----------------------


def init_barrier(barrier: Expr, arrivals: int) -> None:
    """A barrier in shared memory (uint64): a phase ends after so many arrivals, and all bytes."""
    ptx("mbarrier.init.shared.b64", barrier, T.uint32(arrivals))


def publish_barriers() -> None:
    """Barriers that were initialised are so for copies too."""
    ptx("fence.mbarrier_init.release.cluster")


def expect_bytes(barrier: Expr, size: int) -> None:
    """Arrive, and have the phase wait for so many bytes."""
    ptx("mbarrier.arrive.expect_tx.shared.b64", barrier, T.uint32(size))


def arrive(barrier: Expr) -> None:
    ptx("mbarrier.arrive.shared.b64", barrier)


def wait_barrier(barrier: Expr, parity: Expr) -> None:
    """Until the phase of this parity, the first of which is 0, has ended."""
    T.evaluate(T.cuda.mbarrier_wait(barrier, parity))


def copy_box(to: Expr, tensor_map: Expr, column: Expr, row: Expr, barrier: Expr) -> None:
    """The box of the map at (row, column), zeros outside of the tensor; completes the barrier."""
    form = "2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    ptx(f"cp.async.bulk.tensor.{form}", to, T.address_of(tensor_map), column, row, barrier)


def describe_matrix(descriptor: Expr, matrix: Expr) -> None:
    """uint64: rows of 64 16-bit elements with the 128-byte swizzle, 1024 bytes for 8 of them."""
    address = T.address_of(descriptor)
    T.evaluate(T.cuda.wgmma.encode_matrix_descriptor(address, matrix, 1, 64, 3))


def fence_products() -> None:
    ptx("wgmma.fence.sync.aligned")


def multiply_group(
    dtype: str, sums: Sequence[Expr], a: Expr, b: Expr, adds: Expr, columns: int
) -> None:
    """sums[64, columns] (+)= a[64, 16] @ b[columns, 16]^T by four warps, from shared memory."""
    name = _MMA[dtype]
    text = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{name}.{name}"
    ptx(text, *sums, a, b, T.ptx.pred(adds), 1, 1, 0, 0)


def commit_products() -> None:
    ptx("wgmma.commit_group.sync.aligned")


def wait_products(groups: int) -> None:
    """Until at most `groups` of the latest groups of products are still open."""
    ptx("wgmma.wait_group.sync.aligned", groups)


def give_registers(count: int) -> None:
    """All threads of this warpgroup go down to so many."""
    ptx("setmaxnreg.dec.sync.aligned.u32", count)


def take_registers(count: int) -> None:
    ptx("setmaxnreg.inc.sync.aligned.u32", count)


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
