"""Graph[ATEN] -> Graph[MOE]: finds experts and routers in the forms in which models write them.

    experts.py, routers/router.py    the two passes
    forms/      the ways to write experts (a loop, stacked weights, ...): each proposes blocks
    routers/    which experts a row belongs to, and with which weights
    reading/    a region read as what one expert does with its rows
    region.py   the ops between a cut and a result, and the emitter of their replacement

Each proposal is proved by running (`passes/proof/`) before it replaces anything.
"""

from moec.passes.recognise.experts import RecogniseExperts
from moec.passes.recognise.routers.router import RecogniseRouters

__all__ = ["RECOGNISERS", "RecogniseExperts", "RecogniseRouters"]

RECOGNISERS = (RecogniseExperts(), RecogniseRouters())
"""The recognisers, in the order in which they run."""
