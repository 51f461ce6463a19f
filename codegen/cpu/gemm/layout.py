"""The layout that matrix kernels stream: tiles of columns, stored depth by depth.

    w[E, N, K]  ->  packed[E, tiles, depth, columns]

A tile is as wide as the register tile of the kernel, so that each step of the inner loop reads
`columns` neighbours and a whole tile is one contiguous stream. bf16 is stored as pairs along K
(one int32 holds w[n, 2i] and w[n, 2i+1]), which is what the dot-product instruction wants and
what costs nothing to take apart elsewhere. Where two products share a kernel (gate and up), the
left half of each tile is gate and the right half up. Missing columns and the partner of an
odd last element are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.cpu.tuning import DEFAULT, Tuning
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class Layout:
    """How the weights of `spec` lie in memory on `target`; `tuning`, of the kernels that read
    them, changes nothing about that."""

    spec: LinearSpec
    target: CpuTarget
    tuning: Tuning = DEFAULT

    @property
    def vectors(self) -> int:
        """Vectors in a tile: all that fit the registers, fewer where n is small."""
        halves = 2 if self.spec.gated else 1
        needed = -(-self.spec.n // self.target.vector_lanes)
        return halves * min(self.target.tile_vectors // halves, needed)

    @property
    def columns(self) -> int:
        """Columns of products in a tile."""
        return self.vectors * self.target.vector_lanes

    @property
    def width(self) -> int:
        """Columns of y that a tile makes."""
        return self.columns // 2 if self.spec.gated else self.columns

    @property
    def tiles(self) -> int:
        return -(-self.spec.n // self.width)

    @property
    def pairs(self) -> bool:
        return self.spec.dtype == "bfloat16"

    @property
    def amx(self) -> bool:
        """Whether kernels multiply whole register tiles. Each vector of a tile is then a stream
        of its own, of which 16 steps fill a register as they lie."""
        return self.target.bf16_tiles and self.pairs and self.spec.k % 32 == 0

    @property
    def widened(self) -> bool:
        """Whether kernels make float32 of 16-bit numbers, then multiply (upconvert_tile.py)."""
        return self.spec.dtype != "float32" and not (self.pairs and self.target.bf16_dot)

    @property
    def tuned(self) -> tuple[str, ...]:
        """The values of `tuning` that kernels of experts read."""
        fetched = () if self.amx else ("fetched",)
        return (*fetched, "tiles_at_once", "worth")

    @property
    def depth(self) -> int:
        """Steps of the inner loop over all of K."""
        return -(-self.spec.k // 2) if self.pairs else self.spec.k

    @property
    def depth_block(self) -> int:
        """Steps that rows are blocked over: equal blocks, whose weights fill half of the
        second-level cache at most."""
        step = self.columns * 4
        blocks = -(-self.depth // max(64, self.target.l2 // 2 // step))
        return -(-self.depth // blocks)

    @property
    def dtype(self) -> str:
        """The type of the packed array."""
        return "int32" if self.pairs else self.spec.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        if self.amx:
            lanes = self.target.vector_lanes
            return (self.spec.groups, self.tiles * self.vectors, self.depth, lanes)
        return (self.spec.groups, self.tiles, self.depth, self.columns)

    @property
    def bytes(self) -> int:
        """Of the weights of one group."""
        words = self.tiles * self.depth * self.columns
        return words * (2 if self.dtype == "float16" else 4)

    @property
    def sums(self) -> int:
        """Products of two numbers that one row of x needs."""
        return self.spec.n * self.spec.k * (2 if self.spec.gated else 1)

    @property
    def bias_shape(self) -> tuple[int, int, int]:
        """The bias, always float32, lies like one step of the weights."""
        return (self.spec.groups, self.tiles, self.columns)
