"""Reads the graphs of an artifact, which may come from an untrusted source."""

from __future__ import annotations

from pathlib import Path

from moec.errors import ArtifactError, IRError
from moec.ir.graph import Graph, Stage
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse
from moec.runtime.artifact.artifact import graph_part


def stored_graph(path: Path, name: str, text: str) -> Graph:
    """The graph of the function `name` of the artifact at `path`.

    Raises ArtifactError where its text is malformed, or breaks a rule of the IR.
    """
    try:
        graph = parse(text)
        verify(graph, Stage.GROUPED)
    except IRError as error:
        raise ArtifactError(f"{path}: {graph_part(name)} is malformed: {error}") from error
    return graph
