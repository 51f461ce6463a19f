"""Branches on sizes that only choose other sizes: both sides are exported and merged.

    if capacity < 4:
        capacity = 4

An export holds on the side of the example. Where the export on the other side differs from it only
in sizes, both become one program, with `Max(capacity, 4)` in place of these sizes.
"""

from moec.capture.sides.search import with_other_sides

__all__ = ["with_other_sides"]
