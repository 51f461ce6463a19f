"""Numbers with their source, and the reader of the planner's YAML and JSON files."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from moec.errors import SetupError, UsageError

Source = Literal["measured", "data sheet", "assumed"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number in SI units (bytes, seconds, bytes/s, FLOP/s) and where it comes from."""

    value: Annotated[float, msgspec.Meta(ge=0)]
    source: Source
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.source}{', ' + self.note if self.note else ''})"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record in a file; unknown fields are an error."""


T = TypeVar("T", bound=Record)


def preset_names(folder: str) -> list[str]:
    """The names of the files that come with moec: `clusters` or `models`."""
    names = (entry.name for entry in files("moec.plan").joinpath(folder).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def read_preset_or_file(source: str, kind: type[T], folder: str) -> T:
    """The preset of that name, or else the YAML or JSON file.

    Raises UsageError with the file and the violation of its schema.
    """
    names = preset_names(folder)
    if source in names:
        text = files("moec.plan").joinpath(folder, f"{source}.yaml").read_bytes()
        return decode(text, kind, source)
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"{source} is neither a file nor a preset; presets are {', '.join(names)}")
    return decode(path.read_bytes(), kind, source)


def decode(text: bytes, kind: type[T], source: str) -> T:
    """The record in a YAML text (JSON is YAML). Raises UsageError."""
    try:
        return msgspec.yaml.decode(text, type=kind, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SetupError(f"{source}: {error}") from None
