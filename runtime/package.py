"""What codegen hands to the runtime: data only, importable without TVM and without torch.

The library holds a VM function, `main(inputs..., states..., params...)`, which gives the
tuple (outputs..., new contents of the states...) in the order of the ports below. A port of
dtype c64 crosses as f32 with a last axis of 2: real part, imaginary part. Where tokens can come
in pieces it holds a second one, `step` (see `Step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Size: TypeAlias = int | str  # a number, or an expression over named sizes (sizes.parse_dim)

MAIN, STEP = "main", "step"
ROUTE, ROUTED = "routers", "after_routers"


@dataclass(frozen=True)
class Port:
    """One tensor that crosses the border of the compiled function."""

    name: str
    dtype: str  # as in the IR: f32 f16 bf16 f64 i64 i32 i16 i8 u8 bool c64
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class StatePort(Port):
    """A buffer that lives between calls; `initial` names the array that it starts from."""

    initial: str = ""  # empty: zeros


@dataclass(frozen=True)
class CpuNeeds:
    """Which CPU the library was compiled for."""

    name: str
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    mtriple: str = ""
    features: tuple[str, ...] = ()  # LLVM's names of what the code may use


@dataclass(frozen=True)
class Step:
    """`step(input_ids[B, S], first[B], rows[B], last[B], caches..., params...)` of the library.

    The next S tokens of B texts, of which first[b] tokens came before; it gives
    (logits[B, 1, V], caches...): those of the token in row rows[b] of the B*S, which is token
    last[b] of its text. Caches [B, heads, L, width] of keys and values are written in place.
    Others, without the size L, are what the model carries from token to token, zeros at first:
    then each of the S tokens counts, and none may be padding. Nothing is checked inside:
    first[b] + S must be at most L and at most `longest`, None meaning no limit. `stop` are the
    tokens that end a text, as the model's own configuration has them.
    """

    caches: tuple[Port, ...]
    logits: Port
    params: tuple[Port, ...]
    vocabulary: int  # ids below it are looked up
    longest: int | None = None
    stop: tuple[int, ...] = ()

    @property
    def carries(self) -> bool:
        return not all(map(grows, self.caches))


def grows(cache: Port) -> bool:
    """Whether a cache has a place for each token."""
    return len(cache.shape) == 4 and isinstance(cache.shape[2], str)


@dataclass(frozen=True)
class Chosen:
    """A layer with the outputs of `routers` that hold its experts [T, k] and weights [T, k]; no
    name for weights that it has not, or that are known with its rows alone."""

    layer: str
    experts: str
    weights: str = ""


@dataclass(frozen=True)
class Routers:
    """Routers that read no hidden state, as two more functions of the library.

    `routers(inputs..., params...)` gives `outputs`, from some of the model's inputs, and
    `after_routers(inputs..., outputs..., states..., params...)`, with all of them, what `main`
    gives.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: tuple[Chosen, ...]
    route: tuple[Port, ...]  # params
    routed: tuple[Port, ...]


@dataclass(frozen=True)
class Package:
    """A compiled model.

    `params` are the ports of the VM's weight arguments, in order, and `arrays` what they are
    bound to, by name: packed, bf16 as ml_dtypes.bfloat16, memory-mapped where that can be.
    `sizes` are the bounds of the named sizes (low, high or None). `index_ranges` are the
    values that an input may hold (low, high inclusive) because they look up rows of a table.
    `kernels` pairs the place of an op in the model with the kernel that does it; `notes` are
    sentences for the report. `step` is None where tokens cannot come in pieces, and `no_step`
    says why. `tunings` are the values of kernels that were tuned, by the kernel's key.
    """

    target: CpuNeeds
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[StatePort, ...]
    sizes: Mapping[str, tuple[int, int | None]]
    params: tuple[Port, ...]
    arrays: Mapping[str, Any]
    library: Path | bytes
    index_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kernels: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    step: Step | None = None
    no_step: str = "the model was compiled without a cache"
    routers: Routers | None = None
    tunings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def every_param(self) -> tuple[Port, ...]:
        """The ports of the weights of every function; some may come more than once."""
        step, routers = self.step, self.routers
        more = (*routers.route, *routers.routed) if routers else ()
        return (*self.params, *(step.params if step else ()), *more)
