"""Graph[ATEN] -> Graph[MOE]: finds experts and routers in the forms in which models write them."""

from moec.passes.recognise.experts import RecogniseExperts
from moec.passes.recognise.router import RecogniseRouters

__all__ = ["RECOGNISERS", "RecogniseExperts", "RecogniseRouters"]

RECOGNISERS = (RecogniseExperts(), RecogniseRouters())
"""The recognisers, in the order in which they run."""
