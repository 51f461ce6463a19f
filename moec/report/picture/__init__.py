"""Drawing a model: `save(scene, "out.svg")`. The suffix selects the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.report.picture.part import Scene, ScenePart
from moec.report.picture.scene import scene

__all__ = ["Picture", "Scene", "ScenePart", "draw", "save", "scene"]

ENDINGS = (".svg", ".html", ".dot")


def draw(scene: Scene, ending: str) -> str:
    """The picture as text: ".svg", ".html" (with details on click) or ".dot" (for Graphviz).

    Raises UsageError for any other ending.
    """
    if ending == ".svg":
        from moec.report.picture.svg import svg

        return svg(scene)[0]
    if ending == ".html":
        from moec.report.picture.html import html

        return html(scene)
    if ending == ".dot":
        from moec.report.picture.dot import dot

        return dot(scene)
    raise UsageError(f"a picture ends in {', '.join(ENDINGS)}, not {ending or 'nothing'!r}")


def save(scene: Scene, path: Path) -> None:
    """Draw the scene to a file. Raises UsageError where it cannot be written."""
    try:
        path.write_text(draw(scene, path.suffix), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {reason(error)}") from error


@dataclass(frozen=True, repr=False)
class Picture:
    """A scene that notebooks draw."""

    scene: Scene

    def save(self, path: Path | str) -> None:
        """Write it as .svg, .html (with details on click) or .dot. Raises UsageError for another
        ending, and where it cannot be written."""
        save(self.scene, Path(path))

    def __repr__(self) -> str:
        return f"<picture of {self.scene.title}>"

    def _repr_html_(self) -> str:
        return draw(self.scene, ".svg")
