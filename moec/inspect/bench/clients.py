"""Clients of a server with OpenAI's interface, and the times of their answers.

Open loop: requests come at random moments of a given mean rate (a Poisson process), however slow
the answers are, as they do from many users. Closed loop: each of some clients sends its next
request when the last one is answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from moec.errors import SetupError, UsageError

IDS = range(3, 1000)  # of prompts; every vocabulary has them
FIRST, LAST = "data: ", "[DONE]"


@dataclass(frozen=True)
class ServerLoad:
    """`requests` with prompts of random tokens. `rate` requests per second in an open loop, or
    `clients` in a closed one; the other is 0."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    rate: float = 0.0
    clients: int = 0

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s" if self.rate else f"{self.clients} clients"


@dataclass(frozen=True)
class AnswerTimes:
    """Of one answer, in seconds from its request: the time of each event with text, and the end.
    `tokens` are the new ones."""

    events: tuple[float, ...]
    end: float
    tokens: int


@dataclass(frozen=True)
class Answers:
    """What came of a load: the times of the answers, the sentences of those that failed, and the
    seconds from the first request to the last answer."""

    times: tuple[AnswerTimes, ...]
    errors: tuple[str, ...]
    seconds: float


def measure(url: str, load: ServerLoad, key: str = "", seed: int = 0) -> Answers:
    """Send the requests of a load. Raises UsageError where there is no server."""
    return asyncio.run(_measure(url.rstrip("/"), load, key, seed))


async def _measure(url: str, load: ServerLoad, key: str, seed: int) -> Answers:
    chance = random.Random(seed)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    prompts = [chance.choices(IDS, k=load.prompt_tokens) for _ in range(load.requests)]
    # llama.cpp's server promises to keep connections, and closes them after a stream
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        headers=headers, connector=connector, timeout=timeout
    ) as session:
        name = await _model(session, url)
        body = {"model": name, "max_tokens": load.new_tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        send = [_ask(session, url, body | {"prompt": prompt}) for prompt in prompts]
        gather = _open(send, load.rate, chance) if load.rate else _closed(send, load.clients)
        answers = await gather
        seconds = time.perf_counter() - start
    times = tuple(answer for answer in answers if isinstance(answer, AnswerTimes))
    return Answers(times, tuple(a for a in answers if isinstance(a, str)), seconds)


async def _open(
    requests: Sequence[Any], rate: float, chance: random.Random
) -> list[AnswerTimes | str]:
    tasks = []
    for request in requests:
        tasks.append(asyncio.ensure_future(request))
        await asyncio.sleep(chance.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def _closed(requests: Sequence[Any], clients: int) -> list[AnswerTimes | str]:
    waiting, answers = iter(requests), []

    async def client() -> None:
        for request in waiting:
            answers.append(await request)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def _model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(f"{url}/models") as response:
            if response.status == 401:
                raise UsageError(f"{url} needs a key: give --api-key, or set MOEC_API_KEY")
            content = await response.json(content_type=None)
            return str(content["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise SetupError(
            f"{url} is no server with OpenAI's interface ({type(error).__name__} at {url}/models): "
            "give its address with /v1"
        ) from error


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AnswerTimes | str:
    start, events, tokens = time.perf_counter(), [], 0
    try:
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                return f"status {response.status}: {(await response.text())[:200]}"
            async for line in response.content:
                text = line.decode().strip().removeprefix(FIRST)
                if not text or text == LAST or not line.startswith(FIRST.encode()):
                    continue
                event = json.loads(text)
                if "error" in event:
                    return str(event["error"])[:200]
                if event.get("choices"):
                    events.append(time.perf_counter() - start)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (aiohttp.ClientError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    if not events:
        return "the answer has no text"
    return AnswerTimes(tuple(events), time.perf_counter() - start, tokens or len(events))
