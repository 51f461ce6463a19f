"""What an exporter takes of a compiled model."""

from __future__ import annotations

from dataclasses import dataclass

from moec.capture import Captured
from moec.passes.core.runner import PassResult
from moec.report.data import QuantisedLine


@dataclass(frozen=True)
class Transformed:
    """A model after its passes: the last of `pass_results` has the graph to export. `quantised` has
    a line for each module whose weights became codes; `name` is for messages."""

    name: str
    captured: Captured
    pass_results: tuple[PassResult, ...]
    quantised: tuple[QuantisedLine, ...]
