"""The report names the lines that read a clock, an id, the environment or random numbers, whose
values are those of the capture; where two calls differ, the module is refused."""

from __future__ import annotations

import datetime
import logging
import os
import random
import secrets
import time
import uuid
from datetime import date
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.earlier_calls.source_lines import clocks
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.errors import CaptureError

X = torch.randn(3, 4)
LOG = logging.getLogger(__name__)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tables: dict[int, Tensor] = {}


class Now(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * datetime.datetime.now().second


class Utc(Linear):
    def forward(self, x: Tensor) -> Tensor:
        moment = datetime.datetime.now(datetime.UTC)
        return self.linear(x) * (
            2.0 if (moment - moment).total_seconds() > 1 else 1.0 + moment.hour
        )


class Today(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if date.today().day > 40 else 1.0)


class Local(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * time.localtime().tm_hour


class Uuid(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (uuid.uuid4().int % 7)


class Random(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * os.urandom(1)[0]


class Secret(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, secrets.randbelow(4)]


class Id(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (id(x) % 97)


class Unseeded(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * np.random.default_rng().random()


class OwnGenerator(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.Random().random()


class Shuffled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        order = [0, 1, 2, 3]
        random.shuffle(order)
        return self.linear(x)[:, order]


class Permuted(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, np.random.permutation(4)]


class Environment(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(os.environ.get("SCALE_OF_TESTS", "3"))


class Absent(Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = os.environ.get("ABSENT_OF_TESTS")
        return self.linear(x) * (3.0 if scale is None else float(scale))


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if os.getenv("ABSENT_OF_TESTS") is not None:
            y = y * 2
        return y


class Switched(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if os.environ.get("ABSENT_OF_TESTS") else 1.0)


class Contained(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if "ABSENT_OF_TESTS" in os.environ else 1.0)


class Imported(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if perf_counter() > 4e9 else 1.0)


class Hash(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (hash("name") % 97)


LINES = {
    Absent: 'os.environ.get("ABSENT_OF_TESTS")',
    Doubled: 'os.getenv("ABSENT_OF_TESTS")',
    Switched: 'os.environ.get("ABSENT_OF_TESTS")',
    Contained: '"ABSENT_OF_TESTS" in os.environ',
    Environment: 'os.environ.get("SCALE_OF_TESTS", "3")',
    Hash: 'hash("name")',
    Id: "id(x)",
    Now: "datetime.datetime.now()",
    Utc: "datetime.datetime.now(datetime.UTC)",
    Today: "date.today()",
    Local: "time.localtime()",
    Uuid: "uuid.uuid4()",
    Random: "os.urandom(1)",
    Secret: "secrets.randbelow(4)",
    Unseeded: "np.random.default_rng()",
    OwnGenerator: "random.Random()",
    Shuffled: "random.shuffle(order)",
    Permuted: "np.random.permutation(4)",
    Imported: "perf_counter()",
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_reads_a_clock_is_named(kind: Any) -> None:
    (line,) = clocks(kind())
    assert line.startswith("test_clocks.py:")
    assert LINES[kind] in line


@pytest.mark.parametrize("kind", [Unseeded, OwnGenerator])
def test_two_calls_with_different_results_are_refused_with_the_line(kind: Any) -> None:
    with pytest.raises(CaptureError, match="two calls with the same inputs give") as refusal:
        earlier_calls(kind().eval(), (X,), {})
    assert LINES[kind] in str(refusal.value)


def test_the_report_has_the_lines() -> None:
    compiled = moec.compile(Environment().eval(), (X,), verify=False, build=False)
    (note,) = [note for note in compiled.report().notes if "os.environ" in note]
    assert note.endswith("has the value of the capture in every call")


class Logged(Linear):
    """Reads all of them, for logs and attributes only."""

    def forward(self, x: Tensor) -> Tensor:
        start = datetime.datetime.now()
        self.name = f"{uuid.uuid4()}-{secrets.token_hex(4)}-{os.getpid()}"
        self.stamp = time.strftime("%H:%M", time.localtime())
        LOG.debug("%s %s %d", start.isoformat(), os.environ.get("USER", ""), id(self))
        y = self.linear(x)
        self.took = (datetime.datetime.now() - start).total_seconds()
        if self.took > 10 or os.environ.get("SLOW_LAYERS_OF_TESTS", "no") == "yes":
            print("slow", self.took)
        if os.environ.get("ABSENT_OF_TESTS") or "DEBUG_OF_TESTS" in os.environ:
            print(hash("name"))
        if os.environ.get("DEBUG_OF_TESTS") is not None:
            print("debug")
        y = y * (1 + hash((x.ndim, 0.5)) * 0)
        ids = {id(parameter) for parameter in self.parameters()}
        y = y + sum(1 for parameter in self.parameters() if id(parameter) in ids)
        assert isinstance(start, datetime.date)
        return y * random.Random(3).random() * float(np.random.default_rng(1).random())


def test_clocks_may_be_logged_and_seeded_generators_read() -> None:
    module = Logged().eval()
    slots = {slot.words for slot in earlier_calls(module, (X,), {}).slots}
    assert slots <= {"self.name", "self.stamp", "self.took"}
    assert not hasattr(module, "name")
