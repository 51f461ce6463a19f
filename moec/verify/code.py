"""Whether the code of a model for a CPU is right: each kernel, in `main`, its sides, `decode`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from moec.capture import Captured
from moec.errors import InputError, VerificationError
from moec.ir.graph import Graph, Module
from moec.ir.sizes.dims import Dim, evaluate_dim, symbols
from moec.ir.sizes.thresholds import allows
from moec.oracle.agree import at_sizes, sizes_of
from moec.oracle.cases import Case, drawn
from moec.oracle.draws import Draw
from moec.runtime.call.executor import Executor
from moec.runtime.package import DECODE, Package, carries, grows
from moec.runtime.text.texts import Texts
from moec.verify.kernels import NOTHING, KernelsChecked, ProgramParts, check_kernels
from moec.verify.recording import KernelRecord, Recording
from moec.verify.texts import feed_pieces, pieces_of, stops_of

ROWS = 20
"""The rows that each expert of each layer gets, at least."""
_TOKENS = 1 << 12
"""The most tokens that are run for it."""


def check_code(
    package: Package, module: Module, captured: Captured, cases: Sequence[Case]
) -> KernelsChecked:
    """Compare what each kernel writes with what its ops mean (`moec.verify.kernels`): for the
    cases, for an input in which every expert of every layer has `ROWS` rows, and for texts in
    pieces. Raises VerificationError, naming the kernel, where one is wrong."""
    experts = {name: n for program in module for name, n in _choices(module[program].graph).items()}
    parts = parts_of(package, module)

    def needs(call: KernelRecord, number: int) -> Collection[str]:
        return parts[call.function].needed(call, number) if call.function in parts else ()

    recording = Recording(package, experts, needs=needs)
    executor = recording.executor()
    names = [value.name for value in captured.program.graph.inputs]
    for number, case in enumerate(cases):
        recording.complete = not (experts or number)  # without experts, the example has all rows
        _run(executor, names, case)
    recording.spread = recording.complete = True
    for case in _many_tokens(captured, module.main.graph) if experts else ():
        try:
            _run(executor, names, case)
        except InputError:  # drawn values may be none that the model takes
            continue
        break
    recording.spread = recording.complete = False
    if DECODE in package.functions and package.generation is not None:
        _continue_text(executor, recording, stops_of(package.generation)[1:])
    return _check(parts, recording.take())


def check_case(package: Package, module: Module, captured: Captured, case: Case) -> None:
    """Compare what every kernel writes in a case. Raises VerificationError where one is wrong."""
    recording = Recording(package, {}, complete=True)
    _run(recording.executor(), [value.name for value in captured.program.graph.inputs], case)
    _check(parts_of(package, module), recording.take())


def check_choices(parts: Mapping[str, ProgramParts], calls: Sequence[KernelRecord]) -> None:
    """Compare what kernels chose in these calls, and from what, with the `parts` of each function.
    Raises VerificationError where a choice is wrong."""
    for call in calls:
        of_call = parts.get(call.function)
        if of_call and (wrong := check_kernels(of_call, [call], only_choices=True).wrong):
            raise VerificationError(str(wrong))


def parts_of(package: Package, module: Module) -> dict[str, ProgramParts]:
    """Each function whose calls are compared, in parts."""
    return {
        name: ProgramParts(module[name], frozenset(v for site in sites for _, v in site.results))
        for name, sites in package.calls.items()
        if name in module
    }


def _run(executor: Executor, names: Sequence[str], case: Case) -> None:
    executor.reset()
    executor(dict(zip(names, case, strict=False)))


def _check(parts: Mapping[str, ProgramParts], calls: Sequence[KernelRecord]) -> KernelsChecked:
    checked = NOTHING
    for name, of_function in parts.items():
        same = [call for call in calls if call.function == name]
        checked = checked.joined(check_kernels(of_function, same))
    if checked.wrong:
        raise VerificationError(str(checked.wrong))
    return checked


def _choices(graph: Graph) -> dict[str, int]:
    """The numbers of experts, by the names of the values that are choices of them."""
    result: dict[str, int] = {}
    for op in graph.ops:
        if op.name in ("moe.gate", "moe.route"):
            experts = op.inputs[1].shape[0] if op.name == "moe.gate" else op.inputs[0].shape[1]
            if isinstance(experts, int):
                result[op.outputs[1].name] = experts
    return result


def _many_tokens(captured: Captured, graph: Graph) -> Iterator[Case]:
    """Inputs in which spread choices give each expert `ROWS` rows, as far as sizes may grow: drawn
    ones, and the example repeated."""
    outputs = {value.name: value for op in graph.ops for value in op.outputs}
    needs = {outputs[name]: n for name, n in _choices(graph).items()}
    sizes = sizes_of(captured.program, captured.example)
    for value, experts in needs.items():
        tokens, k = value.shape
        assert isinstance(k, int)
        sizes = _grown(captured.program.graph, sizes, tokens, min(_TOKENS, -(-ROWS * experts // k)))
    example = at_sizes(captured.program, captured.example, sizes)
    yield drawn(captured.program, example, Draw("random", 0))
    yield tuple(example)


def _grown(graph: Graph, sizes: dict[str, int], tokens: Dim, most: int) -> dict[str, int]:
    """The sizes, of which those of `tokens` grow in turns until it is `most`, or none can grow."""
    names = sorted(symbols(tokens) & sizes.keys() & graph.bounds.keys())
    while names and evaluate_dim(tokens, sizes) < most:
        name = min(names, key=lambda n: sizes[n])
        larger = {**sizes, name: max(sizes[name] + 1, sizes[name] * 5 // 4)}
        if allows(graph.bounds, larger):
            sizes = larger
        else:
            names.remove(name)
    return sizes


def _continue_text(executor: Executor, recording: Recording, stops: Sequence[int]) -> None:
    """Two texts in pieces, and steps of one token in long caches of random keys and values."""
    decode = executor.package.functions[DECODE]

    def fill(texts: Texts, size: float = 0.0) -> None:
        """What no token was written to may be NaN, of which ops make NaN with a weight of 0."""
        generator = torch.Generator().manual_seed(0)
        for port, cache in zip(decode.caches, texts.caches, strict=True):
            if grows(port):
                tensor = torch.utils.dlpack.from_dlpack(cache.tensor)
                tensor.copy_(size * torch.randn(tensor.shape, generator=generator))

    for number, _ in enumerate(feed_pieces(executor, pieces_of(executor.package), fill)):
        recording.complete = number == 1  # of the next one, which is the longest
    for stop in () if carries(decode) else stops:
        texts = Texts(executor, 2, stop, np.array([stop - 4, stop - 5]))
        fill(texts, 1.0)
        for token in range(4):
            texts.feed([[token], [token]])


def kernels_line(checked: KernelsChecked) -> str:
    least = checked.least_rows
    rows = "" if least is None or least >= ROWS else f"; an expert had {least} rows"
    return (
        f"kernels: {len(checked.kernels)} right on the inputs that they got, in {checked.calls:,} "
        f"calls: the worst error is {checked.worst:.2f} of its bound{rows}"
    )
