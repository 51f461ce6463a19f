"""Capture by speculation: unmodified modules that read counts into Python.

Data that Python reads become symbolic numbers. A branch on them is answered so that the body of a
loop over experts is traced. This assumption is proved by running eager beside the graph, on
routings for which every such branch goes both ways. What cannot be proved is refused, with the
user's line. Read `search.py` first.
"""

from moec.capture.speculate.randomness import refuse_random
from moec.capture.speculate.refusals import Untraceable, explained
from moec.capture.speculate.search import (
    SpeculatedForm,
    masked,
    speculate,
)

__all__ = [
    "SpeculatedForm",
    "Untraceable",
    "explained",
    "masked",
    "refuse_random",
    "speculate",
]
