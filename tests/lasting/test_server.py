"""The short form of `python -m tests.lasting.server`: 60 requests, twice."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

import moec
from tests.lasting.server import Case, run, serve


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_short_life(
    compiled_tiny_moe: moec.CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.moec"
    compiled_tiny_moe.save(path)
    assert serve(path, 60, 2, seed=5, concurrency=30) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("'whole 200': " in line and "'malformed 400': " in line for line in lines)


def test_another_text_is_noticed() -> None:
    """A server that answers every request with one text."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"text": "a"}]}')
        writer.close()

    async def check() -> list[str]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            case = Case({"prompt": "x", "stream": False}, "whole")
            return (await run(port, [case, case], [["a"], ["b"]], 1)).faults

    (fault,) = asyncio.run(check())
    assert fault.startswith("200 ['a'] instead of ['b']")
