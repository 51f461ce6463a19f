"""The options of `torch.compile(..., backend="moec", options={...})` and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.arguments import target_of, text
from moec.cache import Store, default_store, store_in
from moec.errors import UsageError
from moec.passes.calibration.session import Approximate
from moec.passes.core.runner import OptInPass, Pass
from moec.pipeline import choose
from moec.target.named import AnyTarget

REST = ("inductor", "eager")
_ELSEWHERE = {
    "precision": "the kernels compute in the module's own dtype: cast it with module.to(dtype)",
    "dtype": "the kernels compute in the module's own dtype: cast it with module.to(dtype)",
    "dynamic": "pass dynamic=True to torch.compile itself",
    "fullgraph": "pass fullgraph=True to torch.compile itself",
}


@dataclass(frozen=True)
class Options:
    """`rest` is the compiler of everything that is no MoE block. `target`, `opt_level` and `passes`
    are those of `moec.compile`; None is the target of the tensors' device. `strict` raises
    FallbackError instead of leaving a block to `rest`. `cache` stores compiled kernels and
    blocks."""

    rest: str
    target: AnyTarget | None
    opt_level: int
    passes: str
    strict: bool
    cache: Store


def parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """The options with defaults filled in.

    Raises UsageError for an unknown name or value, TargetError for an unknown target.
    """
    settings = dict(options or {})
    if mode not in (None, "default"):
        raise UsageError(
            f"mode={mode!r} is an option of Inductor: leave it out, or set "
            "torch._inductor.config, which applies to the graphs that moec leaves to Inductor"
        )
    for name in settings:
        if name in _ELSEWHERE:
            raise UsageError(f"options: there is no {name!r}: {_ELSEWHERE[name]}")
        if name not in Options.__dataclass_fields__:
            names = ", ".join(Options.__dataclass_fields__)
            raise UsageError(f"options: there is no {name!r}; there are {names}")
    rest = settings.get("rest", "inductor")
    if rest not in REST:
        raise UsageError(f"options: rest is {rest!r}: give one of {', '.join(REST)}")
    strict = settings.get("strict", False)
    if not isinstance(strict, bool):
        raise UsageError(f"options: strict is {strict!r}: give True or False")
    level, passes = settings.get("opt_level", 2), text("passes", settings.get("passes", ""))
    target = target_of(settings["target"], run=True) if "target" in settings else None
    parsed = Options(rest, target, level, passes, strict, _store(settings.get("cache", True)))
    exact(parsed)
    return parsed


def exact(options: Options) -> tuple[Pass, ...]:
    """The passes that `options` select. Raises UsageError for a pass that needs a whole model."""
    passes: list[Pass] = []
    for chosen in choose(options.opt_level, options.passes):
        if isinstance(chosen, Approximate):
            raise UsageError(
                f"options: passes: {chosen.name} changes the model and needs calibration data: "
                "apply it with moec.compile"
            )
        if isinstance(chosen, OptInPass):
            raise UsageError(
                f"options: passes: {chosen.name} rewrites complete models, and torch.compile "
                "passes single blocks: apply it with moec.compile"
            )
        passes.append(chosen)
    return tuple(passes)


def _store(cache: Any) -> Store:
    if isinstance(cache, bool):
        return default_store() if cache else Store(None)
    if isinstance(cache, str | Path):
        return store_in(Path(cache))
    raise UsageError(f"options: cache is {cache!r}: give True, False or the path of a folder")
