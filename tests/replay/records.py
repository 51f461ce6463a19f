"""The records of the suite on disk: one copy of each text, and its owners.

    texts/<hash>.z         the text, compressed, under its hash
    owners-<worker>.jsonl  a line per owner: its key, and [kind, name, hash] of each text, in order

An owner is a test, or an object that tests share (a fixture of a wider scope, a cached function).
Its key is a name without a path, so files may move.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FORMAT = 1


class Record(NamedTuple):
    """One text: its kind (graph, kernel, llvm or program), what it describes, and its hash."""

    kind: str
    name: str
    digest: str


@dataclass(frozen=True)
class Owner:
    """A test, or what tests share, and its records in order.

    How often something shared is made depends on how tests are spread over processes.
    """

    key: str
    shared: bool
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Folder:
    """The records of one run of the suite; each process of the run writes its own list."""

    path: Path

    def add_text(self, text: str) -> str:
        """The hash of the text, which the folder holds from now on."""
        encoded = text.encode()
        digest = hashlib.sha256(encoded).hexdigest()[:32]
        file = self.path / "texts" / f"{digest}.z"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=file.parent)
            with os.fdopen(handle, "wb") as part:
                part.write(zlib.compress(encoded))
            os.replace(name, file)  # processes may write one text at once
        return digest

    def text(self, digest: str) -> str:
        return zlib.decompress((self.path / "texts" / f"{digest}.z").read_bytes()).decode()

    def add_owner(self, owner: Owner, worker: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        line = [FORMAT, owner.key, owner.shared, owner.records]
        with (self.path / f"owners-{worker}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def owners(self) -> Iterator[Owner]:
        """Raises ValueError where another version of this file wrote them."""
        for path in sorted(self.path.glob("owners-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                version, key, shared, records = json.loads(line)
                if version != FORMAT:
                    raise ValueError(f"records have format {version}, this reads {FORMAT}")
                yield Owner(key, shared, tuple(Record(*record) for record in records))
