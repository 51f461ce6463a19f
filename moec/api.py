"""`moec.compile`: compiles a model of any supported form, and verifies the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from moec.arguments import (
    both_targets,
    cast,
    changes,
    check_kinds,
    check_tf32,
    check_tuning,
    example_inputs,
    target_of,
    text,
    tolerance,
)
from moec.capture.behaviour.door import Declared, Described, observe
from moec.capture.behaviour.parts import modules_without_block
from moec.capture.capture import Captured
from moec.capture.doors import (
    Source,
    capture_source,
    example_of,
    open_source,
    traceable,
)
from moec.capture.gc_pause import gc_paused
from moec.codegen.backends import backend_for
from moec.codegen.lower import supported
from moec.errors import CaptureError, NoMatch, UsageError
from moec.formats.notation import Quantisation, parse_parts
from moec.interpret.threads import threads_for
from moec.ir.graph import Stage, stage_of
from moec.model.bind_inputs import bound
from moec.model.build import build_for_gpu, build_model, verify_model
from moec.model.clock import Clock
from moec.model.compiled import CompiledModel
from moec.passes.calibration.budget import Budget, parse_budget
from moec.passes.calibration.files import check as check_calibration
from moec.passes.calibration.session import Approximate, CalibrationSession
from moec.passes.core.runner import Declined, Pass, PassResult, run
from moec.passes.decode import continues_text, incremental
from moec.passes.quantise.codes import QuantisingPass
from moec.passes.recognise.own_rows import FORM as OWN_ROWS
from moec.passes.specialise.hoist_routers import HoistRouters, split
from moec.passes.specialise.record_routing import recorded_layers, with_choices
from moec.pipeline import (
    PassChanges,
    PassSpec,
    choose,
    decode_passes,
    from_stage,
    quantising,
    truncate_after,
    with_calibration,
)
from moec.report.blocks import blocks
from moec.report.data import Block
from moec.report.quantisation import quantised_lines
from moec.runtime.package import (
    DECODE,
    RECORDED,
    RECORDED_DECODE,
    ROUTE,
    ROUTED,
    RecordedLayer,
    RouterPorts,
    route_part,
)

if TYPE_CHECKING:
    from moec.codegen.backend import Backend
    from moec.target.cpu import CpuTarget


@gc_paused()
def compile(
    model: Any,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    allow_fixed: bool | str | Collection[str] = False,
    constants: str | Collection[str] = (),
    target: str | CpuTarget = "cpu",
    dtype: str | torch.dtype | None = None,
    opt_level: int = 2,
    passes: PassChanges = "",
    quant: str | None = None,
    calib: Any = None,
    budget: str = "",
    strict: bool = False,
    verify: bool | float = True,
    fuel: int | None = None,
    stop_after: str | None = None,
    build: bool = True,
    kv_cache: bool = True,
    record_routing: bool = False,
    tune: bool = False,
    backend: Backend | None = None,
    watch: Callable[[PassResult], None] | None = None,
    progress: Callable[[str], None] = lambda phase: None,
    descriptions: Sequence[Declared] = (),
) -> CompiledModel:
    """Compile a complete mixture-of-experts model.

    `model` is a torch module (with example `args` and `kwargs`), an ExportedProgram, the folder of
    a Hugging Face checkpoint, a .pt2 file, or "file.py:factory". Batch and sequence sizes vary
    unless `dynamic_shapes` (torch.export's) says otherwise. `allow_fixed` names inputs whose sizes
    the module may fix at the example's (True: all inputs); otherwise a fixed size is an error.
    `constants` names inputs that always have the values of the example, such as `image_grid_thw`:
    the compiled model does not take them.
    `dtype` converts the weights first, in place; the module is left in eval mode. `passes` changes
    the passes of `opt_level` ("+a,-b"). `verify` compares the result with eager; a float is the
    greatest error allowed, relative to the greatest value of an output. `fuel` limits the number of
    rewrites. `stop_after` names the last pass to run; `build=False` stops before code generation.
    `kv_cache=False` omits the code with which `generate` computes one token at a time.
    `record_routing` adds what `CompiledModel.record_routing` needs; other calls do not change.
    `tune` measures kernels with several parameter values on this machine, and stores the results
    for later compilations. `backend` replaces the target's, for example with one that has a rule of
    your own: `replace(CPU, rules=(mine, *CPU.rules))`. A `target` such as "cpu,cuda:sm_80,sm_90a"
    generates code for CPUs and GPUs; users with a CPU need no CUDA. `backend` may then be of either
    kind.

    `quant` stores the weights of experts in few bits: "int8" or "int4", each optionally with a
    block size (":32", ":64", ":128") and ":asymmetric", or "mxfp4". It is the last step. Rows that
    are multiplied with such weights are rounded to 8 bits, or with ":rows16" to 16. With
    "int8,linears=int8,head=int8" other linear layers and the head are quantised too. Codes are
    rounded to nearest, or with `calib` chosen by GPTQ on that data.

    Passes that change the model, "+prune-experts(keep=0.5)" or `[PruneExperts(keep=0.5)]`, need
    `calib`: tensors by input name, or the path of an .npz, .safetensors or .txt file. `budget`
    ("kl<=0.02") limits the damage measured on it; changes beyond it are undone layer by layer, or
    with `strict` raise an error. `verify` then compares with the changed graph. Exact opt-in
    passes, `[Specialise({"task_id": 3})]`, need neither.

    `descriptions` (`moec.describe`) describe modules that cannot be traced or recognised; each
    description is proved against its module.

    Raises CaptureError, UnsupportedError, TargetError, UsageError, BudgetError and
    VerificationError, all of them MoecError.
    """
    check_kinds(
        stop_after=stop_after, fuel=fuel, backend=backend, watch=watch, progress=progress,
        dynamic_shapes=dynamic_shapes, allow_fixed=allow_fixed, descriptions=descriptions,
        constants=constants,
    )  # fmt: skip
    clock = Clock(progress)
    stored = Quantisation() if quant is None else parse_parts(quant)
    requested = (*choose(opt_level, changes(passes)), *quantising(stored))
    chosen = truncate_after(requested, stop_after)
    allowed = _allowed(requested, chosen, calib, text("budget", budget), strict)
    builds = build and stop_after is None
    target, beside = both_targets(target)
    of_gpu = None
    if backend is not None and beside is not None and backend.kind == beside.kind:
        of_gpu, backend = backend, None
    if tune:
        check_tuning(target_of(target, run=False), builds)
    made_for = target_of(target, run=builds and verify is not False)
    if builds:
        backend = backend or backend_for(made_for)
        backend.ready(made_for)  # a missing tool is reported now rather than after minutes
        if beside is not None:
            of_gpu = of_gpu or backend_for(beside)
            of_gpu.ready(beside)
    limit = tolerance(verify)
    with clock.phase("capture"):
        source = cast(open_source(model, *example_inputs(args, kwargs)), dtype)
        exact = [p for p in requested if not isinstance(p, Approximate)]

        def capture_again(observed: Sequence[Described] = ()) -> Captured:
            with threads_for(_elements(source.model)):
                return capture_source(
                    source, dynamic_shapes, allow_fixed, descriptions, observed, constants
                )

        captured = bound(capture_again(), exact)
    check_tf32(beside or made_for, captured.program.weights)
    if builds and verify is not False and not captured.example and captured.program.graph.inputs:
        raise UsageError(
            f"{source.name} has no example inputs to verify with: give args, or verify=False"
        )
    with clock.phase("passes"):
        session = CalibrationSession(calib, source.files, allowed, strict)

        def passed(captured: Captured) -> tuple[PassResult, ...]:
            stage = stage_of(captured.program.graph)
            todo = from_stage(with_calibration(chosen, session), stage)
            return tuple(run(captured.program, todo, stage=stage, fuel=fuel, watch=watch))

        pass_results = passed(captured)
        refusals: dict[str, str] = {}
        rules = backend or backend_for(made_for)
        missed = (
            _modules_missed(source, pass_results, captured, rules) if stop_after is None else []
        )
        if missed:
            described, refusals = observe(example_of(source), missed)
            if described:
                captured = bound(capture_again(described), exact)
                pass_results = passed(captured)
        first = pass_results
        if stop_after is None:
            captured, pass_results = _in_supported_form(
                captured, pass_results, passed, exact, rules
            )
        # A form without blocks has uninformative reasons; those for the original code come first.
        earlier = () if pass_results is first or _blocks(pass_results) else first
        quantised = quantised_lines(pass_results)
    compiled = CompiledModel(
        source=source,
        captured=captured,
        pass_results=pass_results,
        blocks=_blocks(pass_results),
        declined=(
            *dict.fromkeys(
                d for pass_result in (*earlier, *pass_results) for d in pass_result.declined
            ),
            *(Declined(name, why, "behaviour") for name, why in refusals.items()),
        ),
        target=made_for,
        beside=beside,
        quantised=quantised,
        phases=clock.seconds,
    )
    if not builds:
        return compiled
    if kv_cache:
        with clock.phase("generation"):
            compiled = _with_decode(compiled, decode_passes(opt_level, changes(passes)), rules)
    if any(isinstance(pass_, HoistRouters) for pass_ in chosen):
        compiled = _with_routers(compiled)
    if record_routing:
        compiled = _with_recording(compiled)
    built = build_model(compiled, opt_level, clock, backend, tune)
    if beside is not None:
        built = build_for_gpu(built, beside, opt_level, clock, of_gpu)
    return built if verify is False else verify_model(built, limit, clock)


def _in_supported_form(
    captured: Captured,
    pass_results: tuple[PassResult, ...],
    passed: Callable[[Captured], tuple[PassResult, ...]],
    exact: Sequence[Any],
    backend: Backend,
) -> tuple[Captured, tuple[PassResult, ...]]:
    """The first form of the capture whose ops all have kernels after its passes, with the results
    of the passes. Returns the arguments if there is none: their error is the most informative."""
    form, after = captured, pass_results
    while not supported(after[-1].program.graph, backend):
        if form.other is None:
            return captured, pass_results
        try:
            form = bound(form.other(), exact)
        except CaptureError:
            return captured, pass_results
        after = passed(form)
    return form, after


def _elements(model: Any) -> int:
    """The number of weights of a model or an export."""
    tensors = (
        model.state_dict.values()
        if isinstance(model, ExportedProgram)
        else (*model.parameters(), *model.buffers())
    )
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


def _modules_missed(
    source: Source, pass_results: Sequence[PassResult], captured: Captured, backend: Backend
) -> list[str]:
    """Names of modules that may hold experts and were not recognised, described ones excepted.

    If a rule declined a candidate, or nothing was recognised, these are all modules without a
    block; if the graph cannot be compiled, all modules. A block that lacks its routing does not
    count.
    """
    if not traceable(source):
        return []
    looked = any(
        d.rule == "recognise-experts" for pass_result in pass_results for d in pass_result.declined
    )
    recognised = [block.name for block in _blocks(pass_results) if block.form != OWN_ROWS]
    if not supported(pass_results[-1].program.graph, backend):
        recognised = []
    elif recognised and not looked:
        return []
    assert isinstance(source.model, torch.nn.Module)
    names = modules_without_block(source.model, recognised)
    return [name for name in names if name not in captured.described]


def _with_decode(
    compiled: CompiledModel, passes: Sequence[Pass], backend: Backend
) -> CompiledModel:
    """The model with a program that continues texts, after its passes, or the reason why not."""
    program = compiled.module.main
    if not continues_text(program.graph):
        return compiled
    try:
        pass_results = run(incremental(program), passes, stage=Stage.GROUPED)
        if not supported(pass_results[-1].program.graph, backend):
            raise NoMatch(
                f"the kernels for {compiled.target.name} have no cache of keys and values"
            )
    except NoMatch as why:
        declined = Declined("text generation", str(why), "decode")
        return replace(compiled, declined=(*compiled.declined, declined), no_decode=str(why))
    more = (declined for pass_result in pass_results for declined in pass_result.declined)
    return replace(
        compiled,
        programs={**compiled.programs, DECODE: pass_results[-1].program},
        declined=(*compiled.declined, *more),
    )


def _with_routers(compiled: CompiledModel) -> CompiledModel:
    """The model with the hoisted routers as one program, and the rest as another."""
    hoisted = split(compiled.module.main)
    if hoisted is None:
        return compiled
    layers = tuple(
        RouterPorts(c.layer, c.experts.name, c.weights.name if c.weights else "")
        for c in hoisted.choices
    )
    parts = {route_part(number): part for number, part in enumerate(hoisted.parts, 1)}
    programs = {**compiled.programs, ROUTE: hoisted.route, **parts, ROUTED: hoisted.routed}
    return replace(compiled, programs=programs, router_ports=layers)


def _with_recording(compiled: CompiledModel) -> CompiledModel:
    """The model with second versions of `main` and `decode` that also return the choices of
    experts. Raises UsageError where no layer routes, or where routing is not by one row per
    token."""
    programs = dict(compiled.programs)
    try:
        programs[RECORDED] = with_choices(compiled.module.main)
        if DECODE in programs:
            texts, piece = programs[DECODE].graph.inputs[0].shape
            programs[RECORDED_DECODE] = with_choices(programs[DECODE], (texts * piece, texts))
    except NoMatch as why:
        raise UsageError(
            f"the routing of {compiled.source.name} cannot be recorded: {why}"
        ) from None
    layers = tuple(
        RecordedLayer(layer.layer, layer.experts)
        for layer in recorded_layers(compiled.module.main.graph)
    )
    return replace(compiled, programs=programs, recorded=layers)


def _allowed(
    requested: Sequence[PassSpec], chosen: Sequence[PassSpec], calib: Any, budget: str, strict: bool
) -> Budget:
    """The budget. Raises UsageError where passes lack what they need, or where an option is given
    that no pass uses."""
    for pass_ in chosen:
        if isinstance(pass_, Approximate) and calib is None:
            raise UsageError(
                f"{pass_.name} needs calibration data: give --calib FILE (calib=... in Python)"
            )
    if strict and not budget:
        raise UsageError("--strict fails when the budget is exceeded: give --budget too")
    changes = any(isinstance(pass_, Approximate) for pass_ in requested)
    if budget and not changes:
        raise UsageError(
            "--budget limits passes that change the model, and no such pass was requested; see "
            "moec list passes"
        )
    if (
        calib is not None
        and not changes
        and not any(isinstance(p, QuantisingPass) for p in requested)
    ):
        raise UsageError(
            "--calib is for passes that change the model and for --quant, and neither was "
            "requested; see moec list passes"
        )
    if calib is not None:
        check_calibration(calib)
    return parse_budget(budget)


def _blocks(pass_results: Sequence[PassResult]) -> tuple[Block, ...]:
    """The blocks of the last graph in which experts still have bodies."""
    last = [result for result in pass_results if result.stage in (Stage.ATEN, Stage.MOE)][-1]
    return blocks(last.program.graph)
