"""Models whose file is moved, replaced, cut or written to while they are in use."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np

from moec.errors import ArtifactError
from moec.runtime.call.executor import Executor, load
from tests.runtime import toy


class Slots:
    """An artifact behind a link, as a file or a folder, and a second slot."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.draw, self.root = draw, folder / "case_slots"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.blue, self.green = self.root / "blue.moec", self.root / "green.moec"
        as_folder = draw.random() < 0.4
        for slot in (self.blue, self.green):
            if as_folder:
                shutil.unpack_archive(folder / "toy.moec", slot, "zip")
            else:
                shutil.copy(folder / "toy.moec", slot)
        self.current = self.root / "current.moec"
        self.current.symlink_to(self.blue)

    def _file(self) -> Path:
        """A file of the slot in use."""
        if not self.blue.is_dir():
            return self.blue
        return self.draw.choice(sorted(self.blue.glob("weights/*.bin")))

    def harmless(self) -> None:
        """Nothing is written to the file."""
        match self.draw.randrange(4):
            case 0:
                self._move()
            case 1:
                self._switch()
            case 2:
                os.chmod(self._file(), 0o600)
            case _:
                pass

    def _move(self) -> None:
        self.blue = self.blue.rename(self.root / f"moved{self.draw.randrange(10**6)}.moec")

    def _switch(self) -> None:
        (new := self.root / "next").symlink_to(self.green)
        new.rename(self.current)

    def harmful(self) -> None:
        """The file is written to or cut, and its time perhaps set back."""
        path = self._file()
        before, content = path.stat(), path.read_bytes()
        if self.draw.random() < 0.3:
            os.truncate(path, self.draw.randrange(len(content)))
        else:
            start = self.draw.randrange(len(content))
            size = self.draw.randint(1, 1 << 14)
            changed = content[:start] + bytes(b ^ 255 for b in content[start : start + size])
            with path.open("r+b") as file:
                file.write(changed + content[start + size :])
        if self.draw.random() < 0.5:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def use_case(folder: Path, draw: random.Random) -> list[str]:
    """The faults of a case: other numbers than before, or an error where nothing was written."""
    slots = Slots(folder, draw)
    copy = draw.random() < 0.3
    model = load(slots.current, copy=copy)
    expected = _y(model)
    faults = []
    written = False
    for _ in range(draw.randint(1, 4)):
        if draw.random() < 0.4:
            slots.harmful()
            written = True
        else:
            slots.harmless()
        try:
            if not np.array_equal(_y(model), expected):
                faults.append("a model in use computes other numbers")
        except ArtifactError as error:
            if copy or not written:
                faults.append(f"a model whose file nobody wrote to is refused: {error}")
    return faults


def _y(model: Executor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = model(toy.inputs())["y"]
    return result
