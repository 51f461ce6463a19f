"""What the page at / shows of a server: its load, its speed, the tokens of each expert."""

from __future__ import annotations

from typing import Any

from moec.commands.serving.service import Service


def stats(service: Service) -> dict[str, Any]:
    """The object of GET /v1/moec/stats. `cache` is the share of the caches in use, 0 to 1."""
    load, routing = service.metrics.load, service.routing
    return {
        "model": service.model,
        "created": service.created,
        "chat": service.tokenizer.template is not None,
        "context": service.engine.room,
        "slots": service.engine.slots,
        "running": load.running,
        "waiting": load.waiting,
        "cache": round(load.cached, 4),
        "tokens_per_second": round(service.metrics.rate.value, 1),
        "experts": routing.read() if routing else None,
        "no_experts": None if routing else service.no_routing,
    }
