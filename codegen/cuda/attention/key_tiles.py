"""The tiles of attention on tensor cores, and which attention has one."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.cuda.instructions import WARP
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import HALVES
from moec.errors import NoMatch
from moec.target.cuda import TARGETS

WARPS = 4
STAGES = 2
PADDING = 8
"""Elements between the features of two rows in shared memory, so that eight rows that ldmatrix
reads at once are in eight different banks."""

_LEAST = min(target.shared_memory for target in TARGETS.values())


@dataclass(frozen=True)
class KeyTile:
    """`keys` keys at a time for `fragments` * 16 rows of each warp. `widest` is the greatest number
    of features for which a thread's sums and addresses fit into its registers. The warps of a block
    have different rows and the same keys."""

    fragments: int
    keys: int
    widest: int

    @property
    def rows(self) -> int:
        return WARPS * self.fragments * 16

    @property
    def threads(self) -> int:
        return WARPS * WARP

    def stage(self, spec: AttentionSpec) -> int:
        """Elements of a tile of keys and one of values."""
        return self.keys * (spec.key_dim + spec.value_dim + 2 * PADDING)

    def elements(self, spec: AttentionSpec) -> int:
        """Elements of 16 bits in shared memory: the queries, then the stages."""
        return self.rows * (spec.key_dim + PADDING) + STAGES * self.stage(spec)


KEY_TILES = (KeyTile(2, 64, 64), KeyTile(2, 32, 128), KeyTile(1, 32, 256))


def key_tile(spec: AttentionSpec) -> KeyTile:
    """The first of KEY_TILES that supports a spec. Raises NoMatch if none does."""
    if spec.dtype not in HALVES:
        raise NoMatch(f"tensor cores multiply 16-bit floats, and it computes in {spec.dtype}")
    for width, name in ((spec.key_dim, "keys"), (spec.value_dim, "values")):
        if width % 16:
            raise NoMatch(f"its {name} have {width} features, not a multiple of 16")
    for tile in KEY_TILES:
        if max(spec.key_dim, spec.value_dim) <= tile.widest and 2 * tile.elements(spec) <= _LEAST:
            return tile
    raise NoMatch(
        f"keys of {spec.key_dim} and values of {spec.value_dim} features do not fit into the "
        "registers and the shared memory of a block"
    )
