"""Checks that a checkpoint and a model cover each other: no expert is left out silently."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from moec.errors import CaptureError

_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")


def check_experts(names: Collection[str]) -> None:
    """Raises CaptureError where the experts of a layer are not 0 .. E - 1, each with all weights
    that others have: transformers would stack those that are there."""
    present: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            stem, expert, part = match.groups()
            present.setdefault(stem, {}).setdefault(int(expert), set()).add(part)
    for stem, experts in present.items():
        parts = set().union(*experts.values())
        for expert in range(len(experts)):
            for part in sorted(parts - experts.get(expert, set())):
                raise CaptureError(
                    f"the checkpoint lacks {stem}{expert}{part}, which other experts have"
                )


def check_loading(where: str, loading: Mapping[str, Any], images: bool) -> None:
    """Raises CaptureError, naming the first, where weights are missing, have other shapes than the
    configuration, or are read by nothing: transformers would fill or skip them.

    With `images`, tensors that the language model does not read belong to the rest of the model.
    """
    others = sorted(loading["mismatched_keys"])
    if others:
        name, stored, expected = others[0]
        raise CaptureError(
            f"{where}: the weight {name} is {list(stored)}, and config.json makes it "
            f"{list(expected)}{_more(others, ' differ too')}: they are of different models"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CaptureError(
            f"{where} lacks the weight {missing[0]}{_more(missing)}: config.json is of another "
            "model, or a .safetensors is missing"
        )
    unread = sorted(loading["unexpected_keys"])
    if unread and not images:
        raise CaptureError(
            f"{where} holds {unread[0]}{_more(unread)}, which no weight of the model reads: "
            "config.json is of another model, or transformers is too old for it"
        )


def _more(names: Collection[Any], verb: str = "") -> str:
    count = len(names) - 1
    return f", and {count} other{'s' if count > 1 else ''}{verb}" if count else ""
