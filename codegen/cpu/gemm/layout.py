"""The layout that matrix kernels stream: tiles of columns, stored depth by depth.

    w[E, N, K]  ->  packed[E, tiles, depth, columns]

A tile is as wide as the register tile of the kernel, so that each step of the inner loop reads
`columns` consecutive elements, and a tile is one contiguous stream. bf16 is stored as pairs along K
(one int32 holds w[n, 2i] and w[n, 2i+1]): the operand of the dot-product instruction, which other
targets can split at no cost. Where two products share a kernel (gate and up), the left half of each
tile is gate and the right half up. Missing columns and the partner of an odd last element are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class Layout:
    """The layout of the weights of `spec` on `target`."""

    spec: LinearSpec
    target: CpuTarget

    @property
    def vectors(self) -> int:
        """Vectors in a tile: as many as fit the registers, fewer if n is small."""
        halves = 2 if self.spec.gated else 1
        needed = -(-self.spec.n // self.target.vector_lanes)
        return halves * min(self.target.tile_vectors // halves, needed)

    @property
    def columns(self) -> int:
        """Columns of products in a tile."""
        return self.vectors * self.target.vector_lanes

    @property
    def width(self) -> int:
        """Columns of y that a tile computes."""
        return self.columns // 2 if self.spec.gated else self.columns

    @property
    def tiles(self) -> int:
        return -(-self.spec.n // self.width)

    @property
    def pairs(self) -> bool:
        return self.spec.dtype == "bfloat16"

    @property
    def amx(self) -> bool:
        """Whether kernels use AMX. Each vector of a tile is then a separate stream, of which 16
        consecutive steps fill a tile register."""
        return self.target.bf16_tiles and self.pairs and self.spec.k % 32 == 0

    @property
    def widened(self) -> bool:
        """Whether kernels convert 16-bit floats to float32 first (upconvert_tile.py)."""
        return self.spec.dtype != "float32" and not (self.pairs and self.target.bf16_dot)

    @property
    def depth(self) -> int:
        """Steps of the inner loop over all of K."""
        return -(-self.spec.k // 2) if self.pairs else self.spec.k

    @property
    def depth_block(self) -> int:
        """Steps of a block of K: blocks are equal, and their weights fill at most half of the L2
        cache."""
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
        """The bytes of the weights of one group."""
        words = self.tiles * self.depth * self.columns
        return words * (2 if self.dtype == "float16" else 4)

    @property
    def sums(self) -> int:
        """The multiply-adds of one row of x."""
        return self.spec.n * self.spec.k * (2 if self.spec.gated else 1)

    @property
    def bias_shape(self) -> tuple[int, int, int]:
        """The shape of the packed bias, always float32, in the layout of a step of the weights."""
        return (self.spec.groups, self.tiles, self.columns)
