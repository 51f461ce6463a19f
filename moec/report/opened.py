"""What an artifact stores about itself, read without loading it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.errors import ArtifactError

if TYPE_CHECKING:
    from moec.report.report import Report
    from moec.runtime.artifact.manifest import Manifest


@dataclass(frozen=True, eq=False)
class OpenedArtifact:
    """Works without the compiler, and for artifacts for other machines. The parts that are read
    have been verified; others may be altered."""

    path: Path
    manifest: Manifest
    container: Mapping[str, Any]

    def report(self) -> Report:
        """Raises ArtifactError where there is none, or it is malformed."""
        from moec.report.report import Report

        recorded = self.manifest.extra.get("report")
        if not isinstance(recorded, Mapping):
            raise ArtifactError(
                f"{self.path} has no report; compile it again with this version of moec"
            )
        parts = self.manifest.parts.items()
        packed = sum(part.size for name, part in parts if name.startswith("weights/"))
        return replace(Report.of_dict(recorded), bytes_out=packed, phases={})

    def graph(self, function: str) -> str:
        """The text of the graph of a function. Raises ArtifactError where it is missing or
        altered."""
        from moec.runtime.artifact.artifact import graph_part

        part = graph_part(function)
        if part not in self.manifest.parts:
            raise ArtifactError(f"{self.path} holds no {part}; compile or copy the artifact again")
        return self.part(part).decode(errors="replace")

    def part(self, name: str) -> bytes:
        """A part that the manifest lists. Raises ArtifactError where it is missing or altered."""
        digest = self.manifest.parts[name].sha256
        return bytes(_verified(self.path, self.container, name, digest))


def is_artifact(path: Path) -> bool:
    """Whether it is an artifact: a folder with a manifest, or a .moec file."""
    if path.is_dir():
        return (path / "manifest.json").is_file()
    return path.is_file() and path.suffix == ".moec"


def open_artifact(path: Path) -> OpenedArtifact:
    """Raises ArtifactError where the path is no artifact, or its manifest is altered."""
    from moec.runtime.artifact import manifest as manifests
    from moec.runtime.artifact.container import open_container

    container = open_container(path)
    manifest = manifests.load(_verified(path, container, manifests.NAME, None))
    return OpenedArtifact(path, manifest, container)


def _verified(path: Path, container: Mapping[str, Any], name: str, sha256: str | None) -> Any:
    content = container.get(name)
    if content is None:
        raise ArtifactError(f"{path} is not a moec artifact: it has no {name}")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ArtifactError(
            f"{path}: {name} was changed after it was written; compile or copy the artifact again"
        )
    return content
