"""Graph[ATEN] -> Graph[MOE]: experts and routers in the forms that people write them in."""

from moec.passes.recognise.experts import RecogniseExperts
from moec.passes.recognise.router import RecogniseRouters

__all__ = ["RECOGNISERS", "RecogniseExperts", "RecogniseRouters"]

RECOGNISERS = (RecogniseExperts(), RecogniseRouters())
"""In the order in which they run."""
