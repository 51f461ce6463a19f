"""What all requests of a model share: its engine, its limits, and the places in its queue; and
the models of a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from moec.errors import InputError, MoecError
from moec.runtime.dtypes import Array
from moec.runtime.text.engine import Engine
from moec.runtime.text.guide import Guide
from moec.runtime.text.prompt import Tokenizer
from moec.runtime.text.request import AUTO, Request
from moec.runtime.text.speculation.draft import Draft
from moec.serving.errors import ApiError, invalid
from moec.serving.fields import COMPLETION, EmbeddingFields, Fields
from moec.serving.metrics import MetricFamilies, Metrics
from moec.serving.routing_watch import RoutingWatch
from moec.serving.tools import ToolUse, tool_use
from moec.serving.worker import SHUTTING_DOWN, Worker

THREADS, MOST_WAITING, POOL_SECONDS = 4, 1024, 30.0  # of a pool
LONG_TOKEN = 16  # characters that a token may always have on average
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Service:
    """A model being served. `used` of the `places` are taken by texts that run or wait, counted in
    the event loop alone. `stop` are the tokens that end a text, `fingerprint` that of the code and
    weights. `families` are the metrics of the server. `speculate` and `draft` are those of every
    request. `routing` counts the tokens of experts, `embed` gives the embeddings of texts, by
    index; or `no_routing` and `no_embeddings` say why nothing does."""

    model: str
    fingerprint: str
    engine: Engine
    tokenizer: Tokenizer
    stop: frozenset[int]
    queue: int
    families: MetricFamilies
    routing: RoutingWatch | None = None
    no_routing: str = ""
    speculate: int | str = AUTO
    draft: Draft | None = None
    embed: Callable[[Sequence[Sequence[int]]], Iterator[tuple[int, Array]]] | None = None
    no_embeddings: str = ""
    used: int = 0
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.model, self.families)
        self.worker = Worker(self.engine, self.metrics, self.routing)
        self.places = self.engine.slots + self.queue
        longest = max(map(len, self.tokenizer.tokenizer.get_vocab()), default=0)
        self._most_characters = self.engine.room * max(longest, LONG_TOKEN)

    @property
    def ready(self) -> bool:
        return not (self.draining or self.worker.sickness) and self.used < self.places

    def check_open(self) -> None:
        """Raises ApiError where no request is accepted any more."""
        if self.draining or self.worker.error:
            raise ApiError(503, SHUTTING_DOWN)

    def tool_use(self, fields: Fields) -> ToolUse | None:
        """How the answer may call functions. Raises ApiError where it cannot as requested."""
        chosen = fields.tool_choice, fields.parallel_tool_calls
        return tool_use(fields.tools, *chosen, self.tokenizer)

    def guide(self, fields: Fields, use: ToolUse | None = None) -> Guide | None:
        """The grammar of the texts. Raises ApiError for one that is wrong."""
        if use is not None:
            return use.guide(self.tokenizer)
        if not fields.response_format:
            return None
        try:
            return self.tokenizer.grammars.guide(fields.response_format)
        except MoecError as error:
            raise invalid("response_format", str(error)) from error

    def tokens(self, fields: Fields, use: ToolUse | None = None) -> list[list[int]]:
        """The tokens of the prompts. Raises ApiError where there are none, or a chat needs a
        template."""
        name = "messages" if fields.messages else "prompt"
        if fields.messages and self.tokenizer.template is None:
            raise invalid(name, "the model has no chat template: send text to /v1/completions")
        try:
            if fields.messages:
                messages = [message.plain() for message in fields.messages]
                tools, begun = ((), "") if use is None else (use.for_template, use.begun)
                text = self.tokenizer.check_chat().render(messages, tools, fields.options) + begun
                return [self.encode(text, special=False)]
            return [self.encode(p) if isinstance(p, str) else p for p in fields.prompts]
        except MoecError as error:
            raise invalid(name, str(error)) from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """As `Tokenizer.encode`. Raises InputError for a text that is too long to look at."""
        if isinstance(text, str) and len(text) > (most := self._most_characters):
            rule = f"for {self.engine.room} tokens it has at most {most}: shorten it"
            raise InputError(f"the text has {len(text)} characters, and {rule}")
        return self.tokenizer.encode(text, special=special)

    def embedded_tokens(self, fields: EmbeddingFields) -> list[list[int]]:
        """The tokens of each text. Raises MoecError, naming the text by its index."""
        texts = []
        for index, text in enumerate(fields.texts):
            try:
                texts.append(self.encode(text) if isinstance(text, str) else text)
            except MoecError as error:
                raise InputError(f"text {index}: {error}") from error
            if len(texts[-1]) > self.engine.room:
                rule = f"a text has at most {self.engine.room}: shorten it"
                raise InputError(f"text {index} has {len(texts[-1])} tokens, and {rule}")
        return texts

    def request(self, prompt: Sequence[int], fields: Fields, guide: Guide | None) -> Request:
        """The request for a prompt. Raises ApiError where there is no room for it, or it has a
        token that the model has not."""
        room = self.engine.room - len(prompt)
        most = fields.max_completion_tokens or fields.max_tokens or max(1, room)
        if fields.max_tokens == 0:  # one is drawn, and dropped
            most = 1
        name = "messages" if fields.messages else "prompt"
        if room < most:
            if room > 0:
                name = COMPLETION if fields.max_completion_tokens else "max_tokens"
            rule = (
                f"the prompt has {len(prompt)} tokens and {most} more may follow, and a text has "
                f"at most {self.engine.room}: shorten one of them"
            )
            raise invalid(name, rule, "context_length_exceeded")
        if fields.min_tokens > most:
            raise invalid("min_tokens", f"it is {fields.min_tokens}, and at most {most} may come")
        vocabulary = self.engine.vocabulary
        ids = {"logit_bias": map(int, fields.logit_bias), "stop_token_ids": fields.stop_token_ids}
        for field_name, tokens in ids.items():
            if outside := [token for token in tokens if not 0 <= token < vocabulary]:
                rule = f"token {outside[0]} is not one of the model's {vocabulary} tokens"
                raise invalid(field_name, rule)
        stop = frozenset(() if fields.ignore_eos else self.stop) | {*fields.stop_token_ids}
        request = Request(
            most,
            fields.sampling(self.tokenizer.sampling),
            stop,
            least=fields.min_tokens,
            logprobs=0 if fields.scores is None and fields.best_of else fields.scores,
            scores_prompt=fields.echo and fields.scores is not None,
            guide=guide,
            speculate=self.speculate,
            draft=self.draft,
        )
        try:
            self.engine.check(prompt, request)
        except InputError as error:
            ends = fields.min_tokens and len(stop) >= vocabulary
            raise invalid("min_tokens" if ends else name, str(error)) from error
        return request

    def admit(self, count: int) -> None:
        """Use places for some texts. Raises ApiError where too few are free."""
        if count > self.places:
            raise invalid("n", f"{count} texts, and at most {self.places} run or wait here")
        if self.used + count > self.places:
            self.metrics.rejections.inc()
            message = f"{self.used} texts run or wait already: retry later"
            raise ApiError(429, message, code="queue_full")
        self.used += count


class WorkPool:
    """Threads for what takes longer the longer a request is, which would hold up all others in the
    event loop."""

    def __init__(self, waiting: int = MOST_WAITING, seconds: float = POOL_SECONDS) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "moec request")
        self._semaphore, self._seconds = threading.BoundedSemaphore(waiting), seconds

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function. Raises what it raises, and ApiError where too many wait, or its
        time is over; then its thread ends it."""
        if not self._semaphore.acquire(blocking=False):
            raise ApiError(503, "too many requests are being read: retry later")
        future = self._threads.submit(_contained, partial(function, *args, **kwargs))
        future.add_done_callback(lambda _: self._semaphore.release())
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            rule = f"reading the request takes more than {self._seconds:g} s: shorten it, or retry"
            raise ApiError(503, f"{rule} later") from error


def _contained(function: Callable[[], T]) -> T:
    """The result of a function, which ends no event loop: what it raises is an Exception."""
    try:
        return function()
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class ServedModels:
    """The models of a server by name; requests without one are for the first. `pool` reads them."""

    models: Mapping[str, Service]
    families: MetricFamilies
    pool: WorkPool = field(default_factory=WorkPool)

    @property
    def ready(self) -> bool:
        return all(service.ready for service in self.models.values())

    @property
    def draining(self) -> bool:
        return any(service.draining for service in self.models.values())

    def drain(self) -> None:
        """Accept no more requests."""
        for service in self.models.values():
            service.draining = True

    @property
    def texts(self) -> int:
        """Those that run or wait."""
        return sum(service.used for service in self.models.values())

    def of(self, name: object = None) -> Service:
        """The model of a request. Raises ApiError where it is not served."""
        if name is None:
            return next(iter(self.models.values()))
        if isinstance(name, str) and name in self.models:
            return self.models[name]
        verb = "is" if len(self.models) == 1 else "are"
        names = ", ".join(map(repr, self.models))
        message = f"the model {name!r} is not served here; {names} {verb}"
        raise ApiError(404, message, "model", "model_not_found")
