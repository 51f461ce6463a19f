"""PTX instructions and CUDA functions that kernels use, as Python functions.

TVM turns each PTX instruction into a function with one `asm volatile`. Kernels use only the
instructions in this file, and the emulator in tests/cuda_emulator implements all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.dtypes import LONG_NAMES

WARP = 32
_ALL_LANES = T.uint32(0xFFFFFFFF)
_MMA = {"bfloat16": "bf16", "float16": "f16"}


def ptx(instruction: str, *operands: Expr | int) -> None:
    """Emits one PTX instruction; destination operands come first."""
    T.evaluate(T.ptx[instruction](*operands))


def barrier() -> None:
    """Synchronises the threads of the block, and makes their writes to shared memory visible."""
    T.evaluate(T.tvm_storage_sync("shared"))


def warp_barrier() -> None:
    T.evaluate(T.call_extern("int32", "__syncwarp"))


# ---- copies from global to shared memory, 16 bytes each --------------------------------


def copy_async(to: Expr, source: Expr, size: Expr | None = None) -> None:
    """Copies 16 bytes. With `size`, only `size` bytes are read, and zeros fill the rest."""
    operands = (to, source, 16) if size is None else (to, source, 16, size)
    ptx("cp.async.cg.shared.global", *operands)


def commit_copies() -> None:
    """Puts the copies since the last commit into one group."""
    ptx("cp.async.commit_group")


def wait_copies(groups: int) -> None:
    """Waits until at most `groups` of this thread's latest copy groups are pending."""
    ptx("cp.async.wait_group", groups)


def load_past_cache(words: Sequence[Expr], source: Expr) -> None:
    """Loads four uint32 (16 bytes) without caching them in L1. No thread may write them
    meanwhile."""
    ptx("ld.global.nc.L1::no_allocate.v4.u32", *words, source)


def load_shared(floats: Sequence[Expr], source: Expr) -> None:
    """Loads four float32 (16 bytes) from shared memory."""
    ptx("ld.shared.v4.f32", *floats, source)


# ---- matrix fragments of a warp --------------------------------------------------------


def load_fragments(registers: Sequence[Expr], row: Expr) -> None:
    """Loads four 8x8 matrices of 16-bit elements; lane l passes the address of row l % 8 of matrix
    l / 8."""
    ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, row)


def load_transposed(registers: Sequence[Expr], row: Expr) -> None:
    """As load_fragments, with each matrix transposed."""
    ptx("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", *registers, row)


def multiply(dtype: str, sums: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """sums[16, 8] float32 += a[16, 16] @ b[8, 16]^T of bfloat16 or float16, or a[16, 8] @ b[8, 8]^T
    of float32 rounded to TF32."""
    if dtype == "float32":
        ptx("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", *sums, *a, *b, *sums)
        return
    name = _MMA[dtype]
    ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32", *sums, *a, *b, *sums)


def round_to_tf32(word: Expr) -> None:
    """Rounds the float32 in a uint32 to nearest, to the 11 bits that tensor cores read."""
    ptx("cvt.rna.tf32.f32", word, T.reinterpret("float32", word))


def round_pair(dtype: str, word: Expr, low: Expr, high: Expr) -> None:
    """Rounds two float32 to a uint32 of two bfloat16 or float16."""
    ptx(f"cvt.rn.{_MMA[dtype]}x2.f32", word, high, low)  # the high half comes first


def fma_pair(target: Expr, a: Expr, b: Expr, c: Expr) -> None:
    """target = a * b + c for the two float16 in each uint32, rounded once."""
    ptx("fma.rn.f16x2", target, a, b, c)


# ---- sm_90a: barriers that copies complete, TMA, products of four warps ----------------------


def init_barrier(barrier: Expr, arrivals: int) -> None:
    """Initialises a barrier in shared memory (uint64). A phase ends after `arrivals` arrivals and
    all expected bytes."""
    ptx("mbarrier.init.shared.b64", barrier, T.uint32(arrivals))


def publish_barriers() -> None:
    """Makes initialised barriers visible to asynchronous copies."""
    ptx("fence.mbarrier_init.release.cluster")


def expect_bytes(barrier: Expr, size: int) -> None:
    """Arrives, and adds `size` bytes to those that the phase waits for."""
    ptx("mbarrier.arrive.expect_tx.shared.b64", barrier, T.uint32(size))


def arrive(barrier: Expr) -> None:
    ptx("mbarrier.arrive.shared.b64", barrier)


def publish_copies() -> None:
    """Makes this thread's writes to shared memory, copies that it waited for among them, visible to
    products of warpgroups and to TMA."""
    ptx("fence.proxy.async.shared::cta")


def wait_barrier(barrier: Expr, parity: Expr) -> None:
    """Waits for the end of the phase of this parity; the first phase has parity 0."""
    T.evaluate(T.cuda.mbarrier_wait(barrier, parity))


def copy_box(to: Expr, tensor_map: Expr, column: Expr, row: Expr, barrier: Expr) -> None:
    """Copies the box of the map at (row, column), with zeros outside the tensor, and reports its
    bytes to the barrier."""
    form = "2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    ptx(f"cp.async.bulk.tensor.{form}", to, T.address_of(tensor_map), column, row, barrier)


def describe_matrix(descriptor: Expr, matrix: Expr) -> None:
    """A uint64 matrix descriptor: rows of 64 16-bit elements with the 128-byte swizzle, 1024 bytes
    per 8 rows."""
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
    """Waits until at most `groups` of the latest groups of products are pending."""
    ptx("wgmma.wait_group.sync.aligned", groups)


def give_registers(count: int) -> None:
    """Lowers the registers of every thread of this warpgroup to `count`."""
    ptx("setmaxnreg.dec.sync.aligned.u32", count)


def take_registers(count: int) -> None:
    ptx("setmaxnreg.inc.sync.aligned.u32", count)


# ---- values of all lanes of a warp -----------------------------------------------------


def shuffle_xor(value: Expr, mask: int, dtype: str = "float32") -> Expr:
    """The value of the lane whose index differs in the bits of `mask`; 32 or 64 bits of `dtype`."""
    return T.bind(T.call_extern(dtype, "__shfl_xor_sync", _ALL_LANES, value, T.int32(mask)))


def shuffle(value: Expr, lane: Expr, dtype: str) -> Expr:
    """The value of that lane, which is the same for all lanes; 32 or 64 bits of `dtype`."""
    return T.bind(T.call_extern(dtype, "__shfl_sync", _ALL_LANES, value, lane))


def warp_sum(value: Expr) -> Expr:
    """The sum of all lanes' float32, by a butterfly reduction: always in the same order."""
    for step in (16, 8, 4, 2, 1):
        value = T.bind(value + shuffle_xor(value, step))
    return value


def warp_greatest(value: Expr) -> Expr:
    """The greatest float32 of all lanes; NaN only if all are NaN."""
    for step in (16, 8, 4, 2, 1):
        value = T.bind(T.call_extern("float32", "fmaxf", value, shuffle_xor(value, step)))
    return value


def warp_max(value: Expr) -> Expr:
    """The maximum of all lanes' int32, by one instruction."""
    return T.bind(T.call_extern("int32", "__reduce_max_sync", _ALL_LANES, value))


def warp_min(value: Expr) -> Expr:
    """The minimum of all lanes' int32, by one instruction."""
    return T.bind(T.call_extern("int32", "__reduce_min_sync", _ALL_LANES, value))


def ballot(condition: Expr) -> Expr:
    """uint32: the mask of lanes for which the condition is true."""
    return T.bind(T.call_extern("uint32", "__ballot_sync", _ALL_LANES, condition))


def match(value: Expr) -> Expr:
    """uint32: the mask of lanes with the same int32."""
    return T.bind(T.call_extern("uint32", "__match_any_sync", _ALL_LANES, value))


def count_bits(mask: Expr) -> Expr:
    return T.bind(T.call_extern("int32", "__popc", mask))


def computed_here(value: Expr) -> Expr:
    """The int32, in a way that keeps what is computed from it behind the instructions before: what
    could be computed before a loop would take registers during it."""
    copy = T.alloc_buffer((1,), "int32", scope="local")
    ptx("mov.s32", copy[0], value)
    return T.bind(copy[0])


# ---- scalars ---------------------------------------------------------------------------


def add_atomically(buffer: Buffer, index: Expr, value: int) -> None:
    T.evaluate(T.call_extern("int32", "atomicAdd", buffer.ptr_to([index]), T.int32(value)))


def exp(x: Expr) -> Expr:
    """exp with an error of at most 2 ulp; TVM's own is `__expf`, which is less exact."""
    return T.call_extern("float32", "expf", x)


def exp2(x: Expr) -> Expr:
    """2 to the power of x, with an error of at most 2 ulp."""
    return T.call_extern("float32", "exp2f", x)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c, rounded once."""
    return T.call_extern("float32", "fmaf", a, b, c)


def each(size: int, threads: int, thread: Expr, body: Callable[[Expr], None]) -> None:
    """Runs body(i) for 0 <= i < size, each i by one thread."""
    for turn in range(-(-size // threads)):
        i = T.bind(thread + turn * threads)
        with T.If(i < size), T.Then():
            body(i)


def running_sums(sums: Buffer, size: int, threads: int, thread: Expr) -> int:
    """Computes the inclusive prefix sums of sums[0 : size]. Returns the index of the first: 0 or
    `size`.

    sums: int32[2 * size] in shared memory. The caller synchronises the block before the call; the
    result is visible to all threads when it returns.
    """
    source, step = 0, 1
    while step < size:
        to = size - source

        def add(i: Expr, source: int = source, to: int = to, step: int = step) -> None:
            before = T.if_then_else(i >= step, sums[source + T.max(i - step, 0)], 0)
            T.buffer_store(sums, sums[source + i] + before, [to + i])

        each(size, threads, thread, add)
        barrier()
        source, step = to, step * 2
    return source


@contextmanager
def kernel(name: str, restrict: bool = False) -> Iterator[IRBuilder]:
    """A kernel whose arguments are declared, and whose loops are written, until the end of the
    block; then `get()` of what it yields is the kernel. With `restrict`, CUDA C says that no two
    arguments share memory."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name} | ({"tirx.noalias": True} if restrict else {}))
        yield builder


def argument(name: str, shape: Sequence[Expr | int], dtype: str) -> Buffer:
    """The next argument of the kernel whose frame is open; `dtype` is TVM's name or the IR's."""
    return T.match_buffer(T.arg(name, T.handle()), shape, LONG_NAMES.get(dtype, dtype))
