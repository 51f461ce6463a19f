"""Capture by speculation: unmodified modules whose counts are read into Python.

Data that Python reads become symbolic numbers, and a branch on them is answered as the body of a
loop over experts needs it. What that takes for granted is proved by running eager beside the graph
on routings in which every such branch comes out both ways; what is not proved is refused, with the
user's line. Read `search.py` first.
"""

from moec.capture.speculate.patches import scripts_as_python
from moec.capture.speculate.randomness import refuse_random
from moec.capture.speculate.refusals import Untraceable, explained
from moec.capture.speculate.search import CaptureForm, ConvertedExport, masked, speculate

__all__ = [
    "CaptureForm",
    "ConvertedExport",
    "Untraceable",
    "explained",
    "masked",
    "refuse_random",
    "scripts_as_python",
    "speculate",
]
