"""The interface from codegen to the runtime: data only, importable without TVM and torch.

The library holds a VM function for each of `Package.functions`:

    name(inputs..., states..., caches..., destinations..., params...)
        -> (outputs..., states..., caches...)

in the order of its ports. Destinations are memory for some outputs, which the function writes and
returns. A port of dtype c64 is passed as f32 with a last axis of 2: real part, imaginary part.
`main` is the model as it was captured. The other functions are:

    decode(input_ids[B, S], first[B], rows[B, Q], last[B], caches..., params...) -> logits, caches
        The next S tokens of B texts, after first[b] earlier tokens. The logits [B, Q, V] are those
        of rows rows[b, q] of the B*S rows, which are tokens last[b] + q of their text. The function
        checks nothing: first[b] + S must be at most the caches' length and `Generation.longest`.
    hidden(inputs..., params...) -> hidden states [B, S, D]
        What the head of a language model reads.
    route(inputs..., params...) -> outputs
        The routers that read no hidden state, from the inputs that they need.
    route_part_N(inputs..., params...) -> some outputs of route
        If routers need different inputs: the routers that need these inputs.
    side_N(inputs..., params...) -> outputs of main
        The model at sizes at which it computes something else than `main`, which refuses them.
    routed(inputs..., outputs of route..., states..., params...) -> outputs of main
        The model, with the choices of its hoisted routers as inputs.
    stored_main, stored_decode
        `main` and `decode` with experts that are read from disk when they are needed: see
        `StoredExperts`.
    recorded, recorded_decode
        `main` and `decode` with the choices [T, k] of every layer of `Package.recorded` as further
        outputs, the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from moec.target.cpu import CpuNeeds

Size: TypeAlias = int | str  # a number, or an expression over named sizes (sizes.parse_dim)

MAIN, DECODE = "main", "decode"
HIDDEN = "hidden"
ROUTE, ROUTED = "route", "routed"
RECORDED, RECORDED_DECODE = "recorded", "recorded_decode"
WITH_CACHES = (DECODE, RECORDED_DECODE)
"""Functions whose states are held by the caller."""


def route_part(number: int) -> str:
    """The function of the routers that read the same inputs, from 1 on."""
    return f"{ROUTE}_part_{number}"


def side(number: int) -> str:
    """The function for sizes beyond the bounds of `main`, from 1 on."""
    return f"side_{number}"


@dataclass(frozen=True)
class Port:
    """One tensor that is passed to or from a compiled function."""

    name: str
    dtype: str  # as in the IR: f32 f16 bf16 f64 i64 i32 i16 i8 u8 bool c64
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class StatePort(Port):
    """A buffer that persists between calls; `initial` names the array with its first content."""

    initial: str = ""  # empty: zeros


@dataclass(frozen=True)
class Function:
    """The signature of one function of the library.

    `states` are held by the executor between calls; functions share states of the same name.
    `caches` are held by the caller, one set for each set of texts. `sizes` are the bounds of the
    named sizes and of expressions of them (low, high or None): those of the remainder Mod(S, 4) are
    0 where S must be a multiple of 4. `causes` has the user's line that set some of them.
    `destinations` names the outputs that are written into memory
    of the caller. `index_ranges` are the allowed values (low, high inclusive) of
    inputs that look up rows of a table; sizes, where that of the table varies.
    """

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    params: tuple[Port, ...] = ()
    states: tuple[StatePort, ...] = ()
    caches: tuple[Port, ...] = ()
    sizes: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    index_ranges: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)
    destinations: tuple[str, ...] = ()
    causes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ports(self) -> tuple[Port, ...]:
        """Every port but those of weights."""
        return (*self.inputs, *self.outputs, *self.states, *self.caches)


@dataclass(frozen=True)
class Generation:
    """The properties of a model that continues text.

    Token ids are below `vocabulary`. A text has at most `longest` tokens (None: no limit). `stop`
    are the tokens that end a text, from the model's configuration.
    """

    vocabulary: int
    longest: int | None = None
    stop: tuple[int, ...] = ()


def grows(cache: Port) -> bool:
    """Whether a cache [B, heads, L, width] has a slot for each token, as keys and values do. Any
    other cache is a recurrent state, which starts with zeros and which padding would change."""
    return len(cache.shape) == 4 and isinstance(cache.shape[2], str)


def carries(decode: Function) -> bool:
    """Whether the caches of `decode` forbid padding, see `grows`."""
    return not all(map(grows, decode.caches))


@dataclass(frozen=True)
class RouterPorts:
    """A layer with the outputs of `route` that hold its experts [T, k] and weights [T, k]; the name
    of the weights is empty if it has none, or if they depend on the rows."""

    layer: str
    experts: str
    weights: str = ""


@dataclass(frozen=True)
class Stack:
    """The weights of one product of a layer, for all experts: `arrays` [E, ...]. `key` is the param
    that leads to them in an expert store."""

    key: str
    layer: str
    arrays: tuple[str, ...]


@dataclass(frozen=True)
class StoredExperts:
    """Functions that read experts from disk (`stored_main`, `stored_decode`), by the name of the
    function that they replace, and the stacks of each layer, in the order in which it reads them.

    In their params, the arrays of stacks have any number of slots in place of E, and each stack has
    its key.
    """

    functions: Mapping[str, Function]
    layers: tuple[tuple[Stack, ...], ...]


def stored(name: str) -> str:
    """The function of the library that replaces function `name` where experts are on disk."""
    return f"stored_{name}"


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel by a function: the ops of its graph that the kernel computes, by the names
    of their first outputs (none where it prepares the operands of another kernel); the path of the
    user's module, and the user's line. `results` are the values of the graph that arguments hold
    after it, by the index of the argument."""

    ops: tuple[str, ...]
    origin: str = ""
    line: str = ""
    results: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class RecordedLayer:
    """A layer whose choices can be recorded, and the number of its experts."""

    layer: str
    experts: int


TENSOR_MAP = "tensormap"
"""The type of an argument that is a tensor map of the driver, passed by value."""


@dataclass(frozen=True)
class Launch:
    """A GPU kernel: the types of its arguments (TVM's names, or TENSOR_MAP), and the launch
    parameters that follow them: `blockIdx.x` and others, bytes of dynamic shared memory."""

    name: str
    arguments: tuple[str, ...]
    sizes: tuple[str, ...]


SOURCE, HOST_CODE, CUBIN, PTX = ".cu", ".so", ".cubin", ".ptx"
"""How the names of parts of GpuCode end, after that of an architecture."""


@dataclass(frozen=True)
class GpuCode:
    """The code for GPUs of a target (cuda:sm_80,sm_90a), for each architecture by its name: the
    `launches` of its kernels, and in `parts` their CUDA C (sm_80.cu), the library for a CPU that
    launches them (sm_80.so), and machine code (sm_80.cubin), or PTX for GPUs newer than all of them
    (sm_90.ptx), both by this version of the CUDA `toolkit`."""

    target: str
    launches: Mapping[str, tuple[Launch, ...]]
    parts: Mapping[str, bytes] = field(default_factory=dict)
    toolkit: str = ""


@dataclass(frozen=True)
class BuiltLibrary:
    """The output of a backend: a shared library for a CPU, or the code for GPUs; neither where
    there is no code."""

    host: bytes = b""
    gpu: GpuCode | None = None


@dataclass(frozen=True, repr=False)
class Package:
    """A compiled model.

    `arrays` are the weights of all functions, by param name: packed, bf16 as ml_dtypes.bfloat16,
    memory-mapped if possible. `kernels` pairs the origin of an op in the model with the kernel that
    computes it; `refusals` holds the origin and name of each op that became a plain loop although
    its kind has kernels, and the reason. `notes` are sentences for the report. `generation` is None
    without `decode`, for the reason `no_generation`. `routers` are the layers whose choices `route`
    returns, `recorded` the layers whose choices can be recorded. `calls` are the calls of kernels
    by each function in their order, for a CPU. `gpu` holds the code for GPUs; `library` is empty
    then. `store` is None where experts cannot stay on disk.
    """

    target: CpuNeeds
    functions: Mapping[str, Function] = field(default_factory=dict)
    arrays: Mapping[str, Any] = field(default_factory=dict)
    library: bytes = b""
    kernels: tuple[tuple[str, str], ...] = ()
    refusals: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    generation: Generation | None = None
    no_generation: str = "the model was compiled without a KV cache"
    routers: tuple[RouterPorts, ...] = ()
    recorded: tuple[RecordedLayer, ...] = ()
    gpu: GpuCode | None = None
    store: StoredExperts | None = None
    calls: Mapping[str, tuple[KernelCall, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<package for {self.target_name}: {', '.join(self.functions)}>"

    @property
    def target_name(self) -> str:
        """The target: GPUs if the model has kernels for them, else a CPU."""
        return self.gpu.target if self.gpu else self.target.name

    @property
    def has_code(self) -> bool:
        return bool(self.library or (self.gpu and self.gpu.parts))

    @property
    def main(self) -> Function:
        return self.functions[MAIN]

    @property
    def sides(self) -> tuple[str, ...]:
        """The functions that compute what `main` does, at other sizes."""
        return tuple(name for name in self.functions if name.startswith("side_"))

    @property
    def params(self) -> dict[str, Port]:
        """The ports of the weights of all functions, by name."""
        return {port.name: port for f in self.functions.values() for port in f.params}

    @property
    def states(self) -> dict[str, StatePort]:
        """The states of all functions, by name."""
        return {port.name: port for f in self.functions.values() for port in f.states}
