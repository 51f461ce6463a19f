"""Metrics for Prometheus, with vLLM's names below `moec:`."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from moec.runtime.text.engine import Engine, StepResult

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
RATE_SECONDS = 2.0


@dataclass(eq=False)
class Rate:
    """Tokens per second over the last RATE_SECONDS."""

    _counts: deque[tuple[float, int]] = field(default_factory=deque)  # of tenths of seconds

    def add(self, count: int) -> None:
        now = round(time.monotonic(), 1)
        if self._counts and self._counts[-1][0] == now:
            now, before = self._counts.pop()
            count += before
        self._counts.append((now, count))
        while self._counts[0][0] < now - RATE_SECONDS:
            self._counts.popleft()

    @property
    def value(self) -> float:
        start = time.monotonic() - RATE_SECONDS
        return sum(count for now, count in list(self._counts) if now >= start) / RATE_SECONDS


@dataclass(frozen=True)
class EngineLoad:
    """The texts of an engine, and the share of its caches that is in use, 0 to 1."""

    running: int = 0
    waiting: int = 0
    cached: float = 0.0


class MetricFamilies:
    """The metrics of a server, each with a row for each model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._families: dict[str, Any] = {}

    def of(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        """The metric `name`, which is new where no model has it."""
        if name not in self._families:
            names = ["model_name", *labels]
            metric = kind(f"moec:{name}", text, names, registry=self.registry, **options)
            self._families[name] = metric
        return self._families[name]


class Metrics:
    """The metrics of one model; `load` and `rate` are the latest."""

    def __init__(self, model: str, families: MetricFamilies) -> None:
        self._families, self._model = families, model
        self.load, self.rate = EngineLoad(), Rate()
        self._running = self._of(Gauge, "num_requests_running", "Texts that hold a slot")
        self._waiting = self._of(Gauge, "num_requests_waiting", "Texts that wait for a slot")
        self._usage = self._of(Gauge, "kv_cache_usage_perc", "Share of the caches in use, 0 to 1")
        self._prompt = self._of(Counter, "prompt_tokens", "Tokens of prompts processed")
        self._generated = self._of(Counter, "generation_tokens", "Tokens generated")
        self._queries = self._of(
            Counter, "prefix_cache_queries", "Tokens of prompts that were sought"
        )
        self._hits = self._of(Counter, "prefix_cache_hits", "Tokens of prompts that were known")
        self._guessed = self._of(
            Counter, "spec_decode_num_draft_tokens", "Tokens that were guessed and verified"
        )
        self._accepted = self._of(
            Counter, "spec_decode_num_accepted_tokens",
            "Those of them that were drawn, each of which saved its text a step",
        )  # fmt: skip
        self.rejections = self._of(Counter, "admission_rejections", "Requests answered with 429")
        self._ended = families.of(
            Counter, "request_success", "Texts that ended: stop, length, abort, error",
            "finished_reason",
        )  # fmt: skip
        self._failed = families.of(
            Counter, "text_failures", "Texts that ended with an error, by its class", "error"
        )
        self.first_token = self._of(
            Histogram, "time_to_first_token_seconds", "From request to first token",
            buckets=(*FIRST, 40, 80, 160, 640, 2560),
        )  # fmt: skip
        self.per_token = self._of(
            Histogram, "time_per_output_token_seconds", "(last - first) / (tokens - 1) of a text",
            buckets=TOKEN,
        )  # fmt: skip
        self.latency = self._of(
            Histogram, "e2e_request_latency_seconds", "From request to end", buckets=REQUEST
        )

    def _of(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        return self._families.of(kind, name, text, **options).labels(self._model)

    def observe(self, engine: Engine, step: StepResult | None = None) -> None:
        """The state of the engine, and what a step added."""
        share = engine.cached / (engine.slots * engine.room)
        self.load = load = EngineLoad(engine.running, len(engine.waiting), share)
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._usage.set(load.cached)
        if step is not None:
            self._prompt.inc(step.prompt_tokens)
            self._generated.inc(step.tokens)
            self._guessed.inc(step.guessed_tokens)
            self._accepted.inc(step.accepted_tokens)
            self._queries.inc(step.prompt_tokens + step.reused_tokens)
            self._hits.inc(step.reused_tokens)
            self.rate.add(step.tokens)

    def failed(self, cause: BaseException) -> None:
        self._failed.labels(self._model, type(cause).__name__).inc()

    def ended(self, reason: str) -> None:
        self._ended.labels(self._model, reason).inc()
