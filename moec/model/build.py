"""Builds a model after its passes: generates kernels, loads the package, compares with eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moec.arguments import FULL, QUICK, WHOLE
from moec.capture.language_models import stop_tokens
from moec.errors import UnsupportedError, UsageError
from moec.ir.graph import Module
from moec.ir.interpret.threads import threads_for
from moec.model.clock import Clock
from moec.model.compiled import CompiledModel
from moec.model.forms import ModelForm
from moec.oracle.tolerance import rounds_to_16_bits
from moec.passes.core.runner import Declined
from moec.passes.decode import logits_of
from moec.passes.recognise import RecogniseExperts
from moec.report.report import kernels_of
from moec.runtime.package import DECODE, MAIN, ROUTE, ROUTED
from moec.sources.memory.lock_step import Together, one_by_one
from moec.target.base import Target
from moec.target.cpu import CpuTarget
from moec.target.cuda import CudaTarget
from moec.target.named import missing_features
from moec.verify import check as checking
from moec.verify.code import check_case, check_choices, check_code, kernels_line, parts_of
from moec.verify.recording import Recording
from moec.verify.references import intended
from moec.verify.texts import InterpretedDecoder, check_texts, pieces_of

if TYPE_CHECKING:
    from moec.codegen.backend import Backend
    from moec.runtime.call.executor import Executor


def build_model(
    compiled: CompiledModel,
    opt_level: int,
    clock: Clock,
    backend: Backend | None,
    store: bool | None = None,
) -> CompiledModel:
    """The model with code, and with an executor where this machine can run it. `store`: experts can
    be read from disk; by default, if the model has many weights."""
    module, target = compiled.module, compiled.target
    with clock.phase("kernels"):
        from moec.codegen.package import build as generate

        with list_unrecognised(compiled):
            memory = compiled.source.memory
            memory.check_room(_bytes(module))
            stores = stores_experts(store, module, target)
            package = generate(module, target, opt_level, backend, memory, stores)
        package = replace(package, routers=compiled.router_ports, recorded=compiled.recorded)
        if package.generation is not None:
            stop = stop_tokens(compiled.source.model)
            package = replace(package, generation=replace(package.generation, stop=stop))
        if compiled.no_decode:
            package = replace(package, no_generation=compiled.no_decode)
        named = (replace(b, kernel=kernels_of(b.name, package.kernels)) for b in compiled.blocks)
        compiled = replace(compiled, blocks=tuple(named))
    if missing_features(compiled.target) or not package.has_code:
        return replace(compiled, package=package)
    with clock.phase("load"):
        from moec.runtime.call.executor import Executor

        executor = Executor(package)
    return replace(compiled, package=package, executor=executor)


LARGE = 1 << 30
"""Bytes of weights from which on experts can be read from disk by default."""


def stores_experts(store: bool | None, module: Module, target: Target) -> bool:
    """Whether experts can be read from disk; by default large ones of a model on a CPU. Raises
    UsageError for a GPU and for those of several formats."""
    if store and isinstance(target, CudaTarget):
        raise UsageError("--store reads experts from disk on a CPU, not on a GPU: leave it out")
    ops = (op for name in module for op in module[name].graph.ops if op.name == "grouped.mixed")
    mixed = next(ops, None)
    if store and mixed is not None:
        where = mixed.origin or mixed.outputs[0].name
        raise UsageError(
            f"--store reads experts of one format from disk, and those of {where} have several: "
            "leave it out, or choose one format for each product"
        )
    if store is None:
        return isinstance(target, CpuTarget) and _bytes(module) >= LARGE and mixed is None
    return store


def _bytes(module: Module) -> int:
    """Those of the weights of all programs, each once."""
    weights = {name: w for program in module for name, w in module[program].weights.items()}
    return sum(weight.nbytes for weight in weights.values())


def build_for_gpu(
    compiled: CompiledModel,
    target: CudaTarget,
    opt_level: int,
    clock: Clock,
    backend: Backend | None,
) -> CompiledModel:
    """The model with additional code for GPUs: for `main`, and for `decode` where all of its ops
    have kernels."""
    from moec.codegen.backends import backend_for
    from moec.codegen.lower import supported
    from moec.codegen.package import build as generate

    programs, why = {MAIN: compiled.module.main}, compiled.no_decode
    if DECODE in compiled.module:
        why = f"the kernels for {target.name} have no cache of keys and values"
        if supported(compiled.module[DECODE].graph, backend or backend_for(target)):
            programs[DECODE] = compiled.module[DECODE]
    with clock.phase("kernels for GPUs"), list_unrecognised(compiled):
        memory = compiled.source.memory
        package = generate(Module(programs), target, opt_level, backend=backend, memory=memory)
    if package.generation is None:
        return replace(compiled, for_gpu=replace(package, no_generation=why))
    stop = stop_tokens(compiled.source.model)
    package = replace(package, generation=replace(package.generation, stop=stop))
    return replace(compiled, for_gpu=package)


@contextmanager
def list_unrecognised(compiled: CompiledModel) -> Iterator[None]:
    """While open, an UnsupportedError also lists experts that were not recognised."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}{_not_recognised(compiled.declined)}") from None


def _not_recognised(declined: Sequence[Declined]) -> str:
    """Text about experts that were not recognised, whose ops may have no kernel; empty if none."""
    experts = [d for d in declined if d.rule == RecogniseExperts.name]
    lines = dict.fromkeys(f"\n  {d.where}: {d.reason}" for d in experts)
    return f"\nexperts were not recognised, which would compile:{''.join(lines)}" if lines else ""


def verify_model(
    compiled: CompiledModel, limit: float | None, clock: Clock, way: str = FULL
) -> CompiledModel:
    """The model with the result of `moec.verify.check`. `way` is that of `moec.arguments`; QUICK
    runs no code. Raises VerificationError."""
    paged = compiled.source.memory.paged
    together = one_by_one if way == WHOLE or paged is None else paged.evaluate_together
    weights = compiled.captured.program.weights.values()
    with clock.phase("verify"), threads_for(sum(weight.numel() for weight in weights)):
        if way == QUICK:
            packed = len(compiled.package.arrays) if compiled.package else 0
            check = partial(checking.check, run=None, tolerance=limit, together=together)
            checked = _check_forms(compiled, check, packed)
        else:
            checked = _check_code(compiled, limit, together)
        return replace(compiled, checked=replace(checked, cases=()))


def _check_forms(
    compiled: CompiledModel, check: Callable[..., checking.Checked], packed: int
) -> checking.Checked:
    """The model and its sides; `packed` weights were compared already."""
    forms: list[ModelForm | CompiledModel] = [compiled, *compiled.sides]
    each: list[checking.Checked] = [
        check(form.captured, pass_results=form.pass_results) for form in forms
    ]
    errors = dict(each[0].errors)
    for name, error in (item for side in each[1:] for item in side.errors.items()):
        errors[name] = max(errors.get(name, 0.0), error)
    lines = (line for form in each for line in form.questions)
    questions = (*lines, f"weights: {packed:,} bit for bit")
    notes = tuple(note for form in each for note in form.notes)
    return replace(each[0], errors=errors, notes=notes, questions=questions)


def _check_code(
    compiled: CompiledModel, limit: float | None, together: Together
) -> checking.Checked:
    _, executor = compiled.ready()
    package, kernels = executor.package, None
    if package.gpu is None:
        recording = Recording(package, {})
        executor = recording.executor()
        parts = parts_of(package, compiled.module)

        def written() -> dict[str, torch.Tensor]:
            calls = recording.take()
            check_choices(parts, calls)
            return {name: tensor for call in calls for name, tensor in call.results.items()}

        kernels = checking.Kernels(
            written, lambda case: check_case(package, compiled.module, compiled.captured, case)
        )

    def run_afresh(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        executor.reset()
        if package.gpu is None:
            return executor(inputs)
        results = executor({name: value.cuda() for name, value in inputs.items()})
        return {name: value.cpu() for name, value in results.items()}

    check = partial(checking.check, tolerance=limit, kernels=kernels, together=together)
    checked = _check_forms(compiled, partial(check, run=run_afresh), len(package.arrays))
    if ROUTED in compiled.module:
        by_parts = partial(_by_parts, executor)
        check(compiled.captured, run=by_parts, pass_results=compiled.pass_results)
    lines = checked.questions
    if kernels is not None:
        checking.say("each kernel")
        code = check_code(package, compiled.module, compiled.captured, checked.cases)
        lines = (*lines, kernels_line(code))
    if DECODE in compiled.module and package.generation is not None:
        checking.say("texts in pieces")
        lines = (*lines, _check_texts(compiled, executor))
    return replace(checked, questions=lines)


def _check_texts(compiled: CompiledModel, executor: Executor) -> str:
    """`check_texts` of the graph, and in float32 of the code for GPUs, whose kernels are not
    compared."""
    source, package = intended(compiled.captured, compiled.pass_results), executor.package
    output = source.program.graph.outputs.index(logits_of(source.program.graph))
    weights = sum(weight.numel() for weight in source.program.weights.values())
    few = compiled.source.memory.paged is not None
    pieces = pieces_of(package, None if few else weights, few=few)
    if package.gpu is not None and not rounds_to_16_bits(compiled.graph):
        check_texts(source, executor, output, pieces)
    return check_texts(source, InterpretedDecoder(package, compiled.module[DECODE]), output, pieces)


def _by_parts(executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run the model in two parts: the hoisted routers first, then the rest with their choices."""
    executor.reset()
    ports = executor.package.functions[ROUTE].inputs
    choices = executor({port.name: inputs[port.name] for port in ports}, ROUTE)
    return executor({**inputs, **choices}, ROUTED)
