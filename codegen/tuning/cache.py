"""What was measured before, in the cache: JSON for each kernel, target and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping

from moec import cache
from moec.cache import TUNINGS, Store
from moec.codegen.cpu.tuning import Tuning, of_dict
from moec.codegen.tuning.choose import Gain


def load(store: Store, key: str) -> tuple[Tuning, Gain | None] | None:
    """What `save` kept under a key; None where there is nothing that can be used."""
    content = cache.load(store, TUNINGS, key)
    if content is None:
        return None
    try:
        text = json.loads(content)
        return of_dict(text["values"]), _gain(text["gain"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def save(store: Store, key: str, kernel: str, tuning: Tuning, gain: Gain | None) -> None:
    """Keep the values of a kernel. Its name is for people who look at the file."""
    text = {
        "kernel": kernel,
        "values": tuning.changed(),
        "gain": None if gain is None else {str(t): pair for t, pair in gain.by_tokens.items()},
    }
    cache.save(store, TUNINGS, {key: json.dumps(text).encode()})


def _gain(recorded: Mapping[str, tuple[float, float]] | None) -> Gain | None:
    if recorded is None:
        return None
    return Gain({int(t): (float(gain), float(error)) for t, (gain, error) in recorded.items()})
