"""`moec.compile`: compiles a model of any supported form, and verifies the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from moec.arguments import (
    QUICK,
    allowed_budget,
    both_targets,
    cast,
    check_tf32,
    example_inputs,
    target_of,
    text,
    tolerance,
    verification,
    with_choices,
)
from moec.capture.captured import Captured
from moec.capture.doors import capture_source, open_source
from moec.capture.hub import local_model
from moec.capture.source import Source
from moec.codegen.backends import backend_for
from moec.errors import UsageError
from moec.ir.formats.notation import Quantisation, parse_parts, with_float_rows
from moec.ir.graph import stage_of
from moec.ir.interpret.threads import threads_for
from moec.model.bind_inputs import bound
from moec.model.build import (
    build_for_gpu,
    build_model,
    stores_experts,
    verify_model,
)
from moec.model.clock import Clock
from moec.model.compiled import CompiledModel
from moec.model.forms import ModelForm, best_form
from moec.model.programs import with_decode, with_hidden_states, with_recording, with_routers
from moec.model.sides import with_sides
from moec.options import CompileKeywords, CompileOptions, read_options
from moec.passes.approximate.choices.choose_experts import check_applied
from moec.passes.approximate.training.recover_routers import RecoverRouters
from moec.passes.calibration.session import Approximate, CalibrationSession
from moec.passes.core.runner import PassResult, run
from moec.passes.specialise.hoist_routers import HoistRouters
from moec.pipeline import (
    PassSpec,
    choose,
    decode_passes,
    from_stage,
    keeping,
    prepare,
    quantising,
    truncate_after,
)
from moec.report.data import QuantisedLine
from moec.report.quantisation import quantised_lines
from moec.runtime.process.gc_pause import gc_paused
from moec.target.cpu import CpuTarget

if TYPE_CHECKING:
    from moec.codegen.backend import Backend
    from moec.target.cuda import CudaTarget
    from moec.target.named import AnyTarget


@gc_paused()
def compile(
    model: Any,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[CompileKeywords],
) -> CompiledModel:
    """Compile a complete mixture-of-experts model.

    `model` is a torch module (with example `args` and `kwargs`), an ExportedProgram, the folder of
    a Hugging Face checkpoint, a .gguf or .pt2 file, "file.py:factory", or the id of a model of the
    hub, "org/name" or "org/name:file.gguf", at `revision`: a branch, tag or commit. A module is
    left in eval mode, and `dtype` converts its weights in place. `options` are the fields of
    `moec.options.CompileOptions`, which docs/api.md lists. More about some of them:

    Batch and sequence sizes vary unless `dynamic_shapes` (torch.export's) says otherwise. A size
    that the module fixes is an error, unless `allow_fixed` names the input (True: all inputs). The
    compiled model does not take the inputs that `constants` names. `verify` is "off" (or False),
    "quick", which runs no code, "full" (or True) or the greatest error allowed, relative to the
    greatest value of an output. Where weights stay in files, eager reads each of them once, layer
    by layer, for all inputs of the comparison ("layers"), or evaluates the model for one input
    after the other ("whole"). `record_routing` adds what `CompiledModel.record_routing` needs;
    other calls do not change. `backend` is for example one that has a rule of your own:
    `replace(CPU, rules=(mine, *CPU.rules))`. A `target` such as "cpu,cuda:sm_80,sm_90a" generates
    code for CPUs and GPUs; users with a CPU need no CUDA. `backend` may then be of either kind.

    `quant` stores the weights of experts in few bits: "int8", "int6", "int5", "int4", "int3" or
    "int2", each optionally with a block size (":32", ":64", ":128") and ":asymmetric", "fp8", or
    "mxfp4". It is the last step. Rows that are multiplied with such weights are rounded to 8 bits,
    or with ":rows16" to 16; on CPUs those of fp8 weights are not rounded. With
    "int8,linears=int8,head=int8" other linear layers and the head are quantised too. Codes are
    rounded to nearest, or with `calib` chosen by GPTQ on that data. Without `quant`, weights that a
    checkpoint stores in few bits keep its codes on CPUs ("checkpoint", "checkpoint:rows16"); "none"
    dequantises them.

    `passes` is text, "+prune-experts(keep=0.5)", or a list, `[PruneExperts(keep=0.5)]`. Those that
    change the model need `calib`: tensors by input name, or the path of an .npz, .safetensors or
    .txt file. `budget` ("kl<=0.02") limits the damage measured on it; changes beyond it are undone
    layer by layer, or with `strict` raise an error. `verify` then compares with the changed graph.
    Exact opt-in passes, `[Specialise({"task_id": 3})]`, need neither.

    `adapters` are merged into the weights of a checkpoint in order. `memory` may be bytes; models
    that are no checkpoint are refused with it. Weights that do not fit stay in files, packed ones
    in a temporary one. `store` is for `moec.load(path, memory=...)`.

    Raises CaptureError, UnsupportedError, TargetError, UsageError, BudgetError and
    VerificationError, all of them MoecError.
    """
    checked = read_options(options)
    with local_model(model, checked.revision) as opened:
        return _compiled(opened, example_inputs(args, kwargs), checked)


def _compiled(
    model: Any, example: tuple[tuple[Any, ...], dict[str, Any]], options: CompileOptions
) -> CompiledModel:
    clock = Clock(options.progress or (lambda phase: None))
    builds = options.build and options.stop_after is None
    verified, way = verification(options.verify)
    asks = builds and verified is not False
    runs = asks and way != QUICK
    targets = choose_targets(options.target, options.backend, builds=builds, runs=runs)
    passes, quant = with_choices(options.choices, options.passes, options.quant)
    stored = Quantisation(checkpoint=8) if quant is None else parse_parts(quant)
    stored = with_float_rows(stored) if targets.only_cpus else stored
    requested = (*choose(options.opt_level, passes), *quantising(stored))
    chosen = truncate_after(requested, options.stop_after)
    budget = text("budget", options.budget)
    allowed = allowed_budget(requested, chosen, options.calib, budget, options.strict)
    limit = tolerance(verified)
    with ExitStack() as reading:
        with clock.phase("capture"):
            source = open_source(model, *example, options.adapters, options.memory)
            reading.enter_context(source.memory.reading())
            source = cast(source, options.dtype)
            exact = [p for p in requested if not isinstance(p, Approximate)]
            with threads_for(_elements(source.model)), source.memory.share_values():
                captured = capture_source(
                    source, options.dynamic_shapes, options.allow_fixed, options.descriptions,
                    options.constants,
                )  # fmt: skip
            captured = bound(captured, exact)
        if options.stop_after is None and targets.only_cpus:
            chosen = (*chosen, *keeping(source, stored.checkpoint))
        check_tf32(targets.beside or targets.target, captured.program.weights)
        if asks:
            _check_example(source, captured)
        with clock.phase("passes"):

            def transform(captured: Captured) -> tuple[PassResult, ...]:
                # One session for each form of the model: its original is that form.
                session = CalibrationSession(options.calib, source.files, allowed, options.strict)
                stage = stage_of(captured.program.graph)
                todo = from_stage(prepare(chosen, session), stage)
                return tuple(run(
                    captured.program, todo, stage=stage, fuel=options.fuel, watch=options.watch,
                    memory=source.memory,
                ))  # fmt: skip

            form = (
                ModelForm(captured, transform(captured))
                if options.stop_after is not None
                else best_form(captured, transform, exact, targets.backend)
            )
        compiled = CompiledModel(
            source=source,
            captured=form.captured,
            pass_results=form.pass_results,
            blocks=form.blocks,
            declined=form.declined,
            target=targets.target,
            beside=targets.beside,
            quantised=_quantised(form.pass_results),
            phases=clock.seconds,
        )
        if not builds:
            return compiled
        on_disk = stores_experts(options.store, compiled.module, targets.target)
        special = options.record_routing or on_disk or RecoverRouters in map(type, requested)
        if len(exact) == len(requested) and targets.only_cpus and not special:
            compiled = with_sides(compiled, transform, exact, targets.backend, clock)
        if options.kv_cache:
            with clock.phase("generation"):
                after = decode_passes(options.opt_level, passes)
                compiled = with_decode(compiled, after, targets.backend)
        compiled = _with_other_programs(
            compiled, chosen, options.record_routing, options.embeddings
        )
        level, beside = options.opt_level, targets.beside
        built = build_model(compiled, level, clock, targets.backend, options.store)
        if beside is not None:
            built = build_for_gpu(built, beside, level, clock, targets.beside_backend)
        return verify_model(built, limit, clock, way) if asks else built


def _check_example(source: Source, captured: Captured) -> None:
    """Raises UsageError where verification has no inputs to run with."""
    if not captured.example and captured.program.graph.inputs:
        raise UsageError(
            f"{source.name} has no example inputs to verify with: give args, or verify=False"
        )


def _with_other_programs(
    compiled: CompiledModel, chosen: Sequence[PassSpec], record_routing: bool, embeddings: bool
) -> CompiledModel:
    """The model with its hoisted routers, and the programs for embeddings and recordings."""
    if embeddings:
        compiled = with_hidden_states(compiled)
    if any(isinstance(pass_, HoistRouters) for pass_ in chosen):
        compiled = with_routers(compiled)
    return with_recording(compiled) if record_routing else compiled


def _quantised(pass_results: Sequence[PassResult]) -> tuple[QuantisedLine, ...]:
    check_applied(pass_results)
    return quantised_lines(pass_results)


def _elements(model: Any) -> int:
    """The number of weights of a model or an export."""
    tensors = (
        model.state_dict.values()
        if isinstance(model, ExportedProgram)
        else (*model.parameters(), *model.buffers())
    )
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


@dataclass(frozen=True)
class Targets:
    """`target` with its backend; `beside` is a GPU for which code is generated too, or None."""

    target: AnyTarget
    backend: Backend
    beside: CudaTarget | None = None
    beside_backend: Backend | None = None

    @property
    def only_cpus(self) -> bool:
        return isinstance(self.target, CpuTarget) and self.beside is None


def choose_targets(target: Any, backend: Backend | None, *, builds: bool, runs: bool) -> Targets:
    """The targets by name, with `backend` in place of the one of its kind. `builds` is True where
    code is generated, `runs` where it runs here.

    Raises TargetError and UsageError where a name, a tool or an instruction is missing, now rather
    than after minutes.
    """
    target, beside = both_targets(target)
    of_beside = None
    if backend is not None and beside is not None and backend.kind == beside.kind:
        of_beside, backend = backend, None
    target = target_of(target, run=runs)
    backend = backend or backend_for(target)
    if beside is not None:
        of_beside = of_beside or backend_for(beside)
    if builds:
        backend.ready(target)
        if beside is not None and of_beside is not None:
            of_beside.ready(beside)
    return Targets(target, backend, beside, of_beside)
