"""What a compilation made, as data and as text: the words behind `report()` and `--json`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from moec.damage import Damage
from moec.sizes import product, show_dim

if TYPE_CHECKING:
    import torch

    from moec.ir import Graph, Value
    from moec.passes.runner import Step


@dataclass(frozen=True)
class BlockLine:
    """One MoE block. `kernel` is empty until code is generated."""

    name: str
    experts: int
    top_k: int
    router: str
    activation: str
    form: str
    parameters: int
    active_parameters: int
    shared: str = ""
    kernel: str = ""
    zero: str = ""


@dataclass(frozen=True)
class DeclinedLine:
    where: str
    reason: str
    rule: str


@dataclass(frozen=True)
class PassLine:
    name: str
    stage: str
    rewrites: int
    ops: int
    seconds: float


@dataclass(frozen=True)
class PortLine:
    name: str
    dtype: str
    shape: tuple[str, ...]

    @staticmethod
    def of_dict(recorded: Mapping[str, Any]) -> PortLine:
        return PortLine(recorded["name"], recorded["dtype"], tuple(recorded["shape"]))


@dataclass(frozen=True)
class ErrorLine:
    """How far one output is from eager's: the greatest error relative to the greatest value."""

    output: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class QuantisedLine:
    """The experts of one place, or the linear layers of one name, in fewer bits. `covered` of
    these `parts` are really quantised; errors are those of the weights, as a share of their
    norm: over all, and of the worst part.

    With calibration data, `fewest` is how many rows the part that saw fewest saw, `few` are the
    parts that saw too few and were rounded to nearest; `nearest` and `solved` are the errors of
    the products on these data, with all codes rounded to nearest and with those that are used.
    """

    name: str
    format: str
    parts: int
    covered: int
    bytes_before: int
    bytes_after: int
    error: float
    worst: float
    fewest: int | None = None
    few: tuple[int, ...] = ()
    nearest: float | None = None
    solved: float | None = None


@dataclass(frozen=True)
class MovedLine:
    """How far an output of the quantised model is from the unquantised one's over the cases of
    the verification: the difference as a share of the norm, and in how many of the rows (tokens)
    the greatest value stands elsewhere."""

    output: str
    error: float
    moved: int
    rows: int


@dataclass(frozen=True, repr=False)
class Report:
    """Everything that a person may ask about a compilation. `bytes_out` None: not packed."""

    model: str
    target: str = ""
    parameters: int = 0
    active_parameters: int = 0
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    bytes_out: int | None = None
    inputs: tuple[PortLine, ...] = ()
    outputs: tuple[PortLine, ...] = ()
    states: tuple[PortLine, ...] = ()
    sizes: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    blocks: tuple[BlockLine, ...] = ()
    declined: tuple[DeclinedLine, ...] = ()
    passes: tuple[PassLine, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    verification: tuple[ErrorLine, ...] = ()
    quantised: tuple[QuantisedLine, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document holds it: plain dicts, lists and numbers."""
        return asdict(self)

    @staticmethod
    def of_dict(recorded: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote; fields that this version does not know are left out."""
        lines: dict[str, Callable[[Any], Any]] = {
            "inputs": PortLine.of_dict,
            "outputs": PortLine.of_dict,
            "states": PortLine.of_dict,
            "blocks": lambda d: BlockLine(**d),
            "declined": lambda d: DeclinedLine(**d),
            "passes": lambda d: PassLine(**d),
            "verification": lambda d: ErrorLine(**d),
            "damage": Damage.of_dict,
            "quantised": lambda d: QuantisedLine(**{**d, "few": tuple(d.get("few", ()))}),
            "moved": lambda d: MovedLine(**d),
        }
        known = {k: v for k, v in recorded.items() if k in Report.__dataclass_fields__}
        for name, make in lines.items():
            known[name] = tuple(make(dict(line)) for line in known.get(name, ()))
        known["sizes"] = {name: (low, high) for name, (low, high) in known.get("sizes", {}).items()}
        known["notes"] = tuple(known.get("notes", ()))
        return Report(**known)

    def __str__(self) -> str:
        from moec.report_text import render

        return render(self)

    __repr__ = __str__  # so that `m.report()` at a prompt shows it


def describe_graph(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a Report that a graph and its weights answer: sizes, ports, parameters.

    Parameters that share storage (tied embeddings) count once.
    """
    bytes_by_dtype: dict[str, int] = {}
    parameters = 0
    seen: set[tuple[int, int]] = set()
    dtypes = {param.name: param.dtype for param in graph.params}
    # What compressed weights stand for are the parameters, not what stores them.
    stacks = [op for op in graph.ops if op.name == "moe.decompress"]
    compressed = {value.name for op in stacks for value in op.inputs}
    parameters += sum(cast(int, product(op.outputs[0].shape)) for op in stacks)
    for name, dtype in dtypes.items():
        tensor = weights.get(name)
        if tensor is None:
            continue
        place = (tensor.data_ptr(), tensor.numel())
        if place[0] and place in seen:
            continue
        seen.add(place)
        parameters += tensor.numel() if name not in compressed else 0
        size = tensor.numel() * tensor.element_size()
        bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + size
    before = [state.before for state in graph.states]
    return {
        "parameters": parameters,
        "bytes_by_dtype": bytes_by_dtype,
        "inputs": tuple(port(v) for v in graph.inputs if v not in before),
        "outputs": tuple(port(v) for v in graph.outputs),
        "states": tuple(port(v) for v in before),
        "sizes": {name: (b.low, b.high) for name, b in graph.bounds.items()},
    }


def port(value: Value) -> PortLine:
    return PortLine(value.name, value.dtype, tuple(show_dim(dim) for dim in value.shape))


def pass_lines(steps: Iterable[Step]) -> tuple[PassLine, ...]:
    return tuple(
        PassLine(s.name, s.stage.name, s.rewrites, len(s.program.graph.ops), s.seconds)
        for s in steps
    )


def block_lines(
    blocks: Iterable[Any], kernels: Sequence[tuple[str, str]] = ()
) -> tuple[BlockLine, ...]:
    """Lines for recognised blocks; `kernels` pairs places in the model with what runs there."""
    return tuple(
        BlockLine(
            block.name,
            block.experts,
            block.top_k,
            str(block.router),
            block.activation,
            block.form,
            block.parameters,
            block.active_parameters,
            "" if block.shared is None or block.shared is False else str(block.shared),
            kernels_of(block.name, kernels),
            block.zero,
        )
        for block in blocks
    )


def kernels_of(path: str, kernels: Sequence[tuple[str, str]]) -> str:
    """The kernels that run what stands at `path` in the model, each once, in order."""
    return ", ".join(dict.fromkeys(kernel for where, kernel in kernels if inside(where, path)))


def inside(where: str, path: str) -> bool:
    return where == path or where.startswith(path + ".")
