"""Earlier measurements, in the cache: a JSON file for each kernel, target and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping

from moec import cache
from moec.cache import TUNINGS, Store
from moec.codegen.tuning.choose import Gain
from moec.codegen.tuning.tunable import Tunable, Values


def load(store: Store, key: str, kernel: Tunable) -> tuple[Values, Gain | None] | None:
    """The record that `save` stored under a key; None if there is none, or it is unusable."""
    content = cache.load(store, TUNINGS, key)
    if content is None:
        return None
    try:
        text = json.loads(content)
        values = {name: int(value) for name, value in text["values"].items()}
        if not all(value in kernel.candidates[name] for name, value in values.items()):
            return None
        return values, _gain(text["gain"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def save(store: Store, key: str, kernel: str, values: Values, gain: Gain | None) -> None:
    """Stores the values of a kernel. Its name is for people who read the file."""
    text = {
        "kernel": kernel,
        "values": dict(values),
        "gain": None if gain is None else {str(t): pair for t, pair in gain.by_tokens.items()},
    }
    cache.save(store, TUNINGS, {key: json.dumps(text).encode()})


def _gain(recorded: Mapping[str, tuple[float, float]] | None) -> Gain | None:
    if recorded is None:
        return None
    return Gain({int(t): (float(gain), float(error)) for t, (gain, error) in recorded.items()})
