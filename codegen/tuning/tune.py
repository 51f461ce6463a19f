"""Tunes the kernels of a model, each once, for this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from moec.cache import Store, key_of
from moec.codegen.tuning import cache
from moec.codegen.tuning.choose import Gain, choose
from moec.codegen.tuning.measure import TOKENS, Measure
from moec.codegen.tuning.tunable import Tunable, Values
from moec.errors import NoMatch
from moec.runtime.process.threads import set_threads
from moec.target.cpu import CpuTarget, processor


@dataclass(frozen=True)
class Tuned:
    """The tuning values of a kernel; `gain` is None if the default is best. `from_cache`: an
    earlier compilation measured them. `why`: the reason why the kernel was not measured."""

    kernel: Tunable
    values: Values = field(default_factory=dict)
    gain: Gain | None = None
    from_cache: bool = False
    why: str = ""


def tune(
    kernels: Sequence[Tunable],
    target: CpuTarget,
    measure: Measure,
    store: Store,
    context: object = "",
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Tuned, ...]:
    """Each kernel with its values, from the cache in `store`, or measured and stored there.

    `context` is a further part of the cache's key.
    """
    tunings = []
    for number, kernel in enumerate(kernels, 1):
        progress(f"tune {number}/{len(kernels)} {kernel.name}")
        key = key_of(
            "tuning", kernel.key, target, processor(), set_threads(), context, TOKENS,
            *kernel.candidates.items(),
            *(version(name) for name in ("moec", "apache-tvm")),
        )  # fmt: skip
        entry = cache.load(store, key, kernel)
        if entry is not None:
            tunings.append(Tuned(kernel, *entry, from_cache=True))
            continue
        try:
            values, gain = choose(kernel, measure(kernel))
        except NoMatch as why:
            tunings.append(Tuned(kernel, why=str(why)))
            continue
        cache.save(store, key, kernel.name, values, gain)
        tunings.append(Tuned(kernel, values, gain))
    return tuple(tunings)
