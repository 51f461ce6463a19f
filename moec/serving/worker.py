"""The thread that steps the engine. Texts and cancellations reach it between two steps; it hands
the tokens of a step over together, to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from moec.errors import MoecError, first_line
from moec.runtime.text.engine import FAILED, Continuation, Engine
from moec.runtime.text.request import Request
from moec.runtime.text.sampling import Logprobs, NoTokenError
from moec.serving.errors import ApiError
from moec.serving.metrics import Metrics
from moec.serving.routing_watch import RoutingWatch

SHUTTING_DOWN = "the server is shutting down: send the request to another"
STALLED_SECONDS = 120.0  # a step of a busy engine that takes longer counts as stuck
MOST_FAILED = 3  # calls of the model in a row, by which it counts as broken
LOGGER = logging.getLogger("moec.serve")


@dataclass(frozen=True)
class Update:
    """One more token of a text of a request, by its index, with its log probability if that was
    requested; `end` of a Continuation, and what its client is told where that is FAILED."""

    index: int
    token: int | None
    logprobs: Logprobs | None = None
    end: str = ""
    error: ApiError | None = None


@dataclass(eq=False)
class Ticket:
    """A text for the engine: choice number `choice` of its prompt, text `index` of its request."""

    prompt: Sequence[int]
    request: Request
    choice: int
    index: int
    updates: asyncio.Queue[Update]
    text: Continuation | None = None


class Worker:
    """Runs an engine in a thread, which whatever a step raises does not end. Its methods are called
    from the event loop."""

    def __init__(
        self, engine: Engine, metrics: Metrics, routing: RoutingWatch | None = None
    ) -> None:
        self.engine, self._metrics, self._routing = engine, metrics, routing
        self.error = ""  # the sentence of what ended the thread
        self._inbox: SimpleQueue[tuple[Ticket | None, bool]] = SimpleQueue()
        self._tickets: dict[Continuation, Ticket] = {}
        self._stepped = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moec engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step, and every text with an error; waits for that."""
        self._inbox.put((None, False))
        self._thread.join()

    def submit(self, ticket: Ticket) -> None:
        self._inbox.put((ticket, True))
        if self.error:  # the thread may have ended before it took the ticket
            error = ApiError(503, self.error)
            ticket.updates.put_nowait(Update(ticket.index, None, end=FAILED, error=error))

    def cancel(self, ticket: Ticket) -> None:
        """Before the next step; does nothing where the text has ended."""
        self._inbox.put((ticket, False))

    @property
    def sickness(self) -> str:
        """Why no text will advance; empty where that is not known."""
        if self.error or not self._thread.is_alive():
            return self.error or "the engine has ended"
        if self.engine.failed_calls >= MOST_FAILED:
            return f"the last {self.engine.failed_calls} calls of the model failed: see the log"
        waited = time.monotonic() - self._stepped
        return "the engine is stuck" if self.engine.busy and waited > STALLED_SECONDS else ""

    def _run(self) -> None:
        while True:
            try:
                if not self._receive():
                    break
                if self._routing:
                    self._routing.switch()
                step = self.engine.step()
                self._metrics.observe(self.engine, step)
                self._deliver(step.advanced)
            except BaseException as error:
                self._deliver(self.engine.fail(error))
        self.error = SHUTTING_DOWN
        if self._routing:
            self._routing.switch(ended=True)
        self._receive()
        for text in self._tickets:
            text.end, text.error, text.new = FAILED, self.error, 0
        self._deliver(tuple(self._tickets))

    def _receive(self) -> bool:
        """Take all that has come, and wait where there is nothing to do. False: end the thread."""
        with suppress(Empty):
            while True:
                ticket, joins = self._inbox.get(block=not (self.engine.busy or self.error))
                self._stepped = time.monotonic()
                if ticket is None:
                    return False
                if joins:
                    try:
                        text = self.engine.submit(ticket.prompt, ticket.request, ticket.choice)
                    except BaseException as error:
                        self._hand_over([(ticket, self._failure(ticket, error, first_line(error)))])
                        continue
                    ticket.text, self._tickets[text] = text, ticket
                elif ticket.text is not None:
                    self.engine.cancel(ticket.text)
                    self._tickets.pop(ticket.text, None)
                self._metrics.observe(self.engine)
        self._stepped = time.monotonic()
        return True

    def _deliver(self, texts: Sequence[Continuation]) -> None:
        updates: list[tuple[Ticket, Update]] = []
        for text in texts:
            if text not in self._tickets:  # cancelled
                continue
            ticket = self._tickets.pop(text) if text.end else self._tickets[text]
            scores = [*text.logprobs[len(text.logprobs) - text.new :], *[None] * text.new]
            new = [Update(ticket.index, *item) for item in zip(text.latest, scores, strict=False)]
            if text.end == FAILED:
                new.append(self._failure(ticket, text.cause, text.error))
            else:
                new[-1] = replace(new[-1], end=text.end)
            updates += [(ticket, update) for update in new]
        self._hand_over(updates)

    def _failure(self, ticket: Ticket, cause: BaseException | None, error: str) -> Update:
        """The last update of a text, whose error is logged and counted."""
        status = 503  # shutting down
        if cause is not None:
            refused, expected = isinstance(cause, NoTokenError), isinstance(cause, MoecError)
            status, level = (400, logging.INFO) if refused else (500, logging.ERROR)
            self._metrics.failed(cause)
            LOGGER.log(level, "a text ended: %s", error, exc_info=None if expected else cause)
        return Update(ticket.index, None, end=FAILED, error=ApiError(status, error))

    def _hand_over(self, updates: Sequence[tuple[Ticket, Update]]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who wait
            self._loop.call_soon_threadsafe(_hand_over, updates)


def _hand_over(updates: Sequence[tuple[Ticket, Update]]) -> None:
    for ticket, update in updates:
        ticket.updates.put_nowait(update)
