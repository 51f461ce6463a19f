"""`moec bench --serve`: a server under load."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.bench.served import ServedResult


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a list such as 1,4,16. Raises UsageError."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(not 0 < value < 1e6 for value in values):
        raise UsageError(f"{option} {text}: give numbers above 0, such as 1,4,16")
    return values


def bench_served(
    target: str,
    rates: Sequence[float],
    clients: Sequence[float],
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    key: str,
    progress: Callable[[str], object],
) -> ServedResult:
    """Measure the server at a URL, or one that is started for an artifact.

    Raises UsageError where there is none.
    """
    import platform

    from moec.bench.clients import Load, measure
    from moec.bench.served import ServedResult, served
    from moec.target.cpu import processor

    loads = [Load(requests, prompt_tokens, new_tokens, rate=rate) for rate in rates]
    loads += [Load(requests, prompt_tokens, new_tokens, clients=int(n)) for n in clients]
    slots = int(max(clients, default=16))
    with _server(target, slots, prompt_tokens + new_tokens, threads) as url:
        measure(url, Load(2, prompt_tokens, new_tokens, clients=1), key)  # memory, and the machine
        lines = []
        for load in loads:
            progress(load.name)
            lines.append(served(load, measure(url, load, key)))
    name = target if target.startswith("http") else Path(target).name
    return ServedResult(name, f"{processor()}, {platform.machine()}", tuple(lines))


@contextmanager
def _server(target: str, slots: int, room: int, threads: int | None) -> Iterator[str]:
    """The address of a server with /v1; one of an artifact runs while this is open."""
    if re.match("https?://", target):
        yield target if target.rstrip("/").endswith("/v1") else target.rstrip("/") + "/v1"
        return
    command = [sys.executable, "-m", "moec", "serve", target, "--port", "0"]
    command += ["--slots", str(slots), "--context", str(room), "--queue", "100000"]
    command += ["--prefix-tokens", "0"]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            line = child.stderr.readline()
            if not (address := re.search(r"http://\S+/v1", line)):
                raise UsageError((line + child.stderr.read()).strip().removeprefix("error: "))
            yield address[0]
        finally:
            child.terminate()
            child.wait()
