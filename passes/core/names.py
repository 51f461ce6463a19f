"""The names of all passes, and the syntax of --passes: "+prune-experts(keep=0.5),-fuse-gate".

The passes themselves import torch, which takes seconds. This module reports a typo in --passes
without it.
"""

from __future__ import annotations

import re

from moec.errors import UsageError
from moec.spelling import did_you_mean

NAMES = (
    "canonicalise",
    "share-common",
    "fuse-norm",
    "fuse-attention",
    "fold-mask",
    "fuse-rotary",
    "recognise-experts",
    "recognise-routers",
    "split-packed",
    "recognise-hierarchies",
    "recognise-mixtures",
    "share-experts",
    "join-calls",
    "fuse-gate",
    "fold-addend",
    "fold-constants",
    "expand-experts",
    "expand-forced",
    "expand-routers",
    "expand-mixtures",
    "expand-hierarchies",
    "expand-soft-mixtures",
    "expand-neurons",
    "expand-convolutions",
    "fuse-activation",
    "fuse-dispatch",
    "fuse-decompress",
    "fuse-residual",
    "fold-permutes",
    "fuse-append",
    "prune-experts",
    "keep-used",
    "average-experts",
    "merge-experts",
    "compress-experts",
    "tune-grids",
    "insert-zero-experts",
    "refactor-dense",
    "specialise",
    "hoist-routers",
    "fold-lora",
    "fold-supernet",
    "join-linears",
    "aggregate-experts",
    "plan-parallelism",
)
"""In the order of moec/pipeline.py; passes that run only on request are at the end."""
ON_REQUEST = ("quantise-experts", "quantise-linears")
"""The passes of --quant; --stop-after accepts them too."""

_ITEM = re.compile(r"\s*([^,()]*(?:\([^()]*\))?[^,()]*)\s*(?:,|$)")


def split(text: str) -> list[str]:
    """The items of "+a(b=1,c=2),-d", split at the commas outside parentheses.

    Raises UsageError if a parenthesis has no partner.
    """
    items: list[str] = []
    at = 0
    while at < len(text):
        match = _ITEM.match(text, at)
        if match is None:
            raise UsageError(f"--passes {text}: a parenthesis is unbalanced")
        items.append(match[1].strip())
        at = match.end()
    return [item for item in items if item]


def sign_and_name(item: str) -> tuple[str, str]:
    """The sign and the name of "+name" or "-name(option=1)". Raises UsageError for an unknown
    pass."""
    sign, name = item[:1], item[1:].partition("(")[0].strip()
    bare = item.partition("(")[0].strip()
    if bare in NAMES:
        raise UsageError(f"--passes {item}: write +{bare} or -{bare}")
    if sign not in ("+", "-") or name not in NAMES:
        near = did_you_mean(bare.lstrip("+-"), NAMES)
        rule = near or f", where name is one of {', '.join(NAMES)}"
        raise UsageError(f"--passes {item}: write +name or -name{rule}")
    return sign, name


def check_last(stop_after: str) -> None:
    """Raises UsageError unless --stop-after is a pass or the beginning of a pass's name."""
    names = ("capture", *NAMES, *ON_REQUEST)
    if not any(name == stop_after or name.startswith(f"{stop_after}-") for name in names):
        near = did_you_mean(stop_after, names) or f"; there are {', '.join(names)}"
        raise UsageError(f"--stop-after {stop_after}: no such pass{near}")
