"""`moec.compile` and what it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moec import check as checking
from moec.approximate import Approximate, Frame
from moec.arguments import cast, changes, example_inputs, target_of, text, tolerance
from moec.blocks import Block, blocks
from moec.budget import Budget
from moec.budget import budget as budget_of
from moec.calibration import check as check_calibration
from moec.calling import call
from moec.capture import Captured, capture
from moec.capture.doors import Source, open_source, stop_tokens
from moec.closeness import default_tolerance
from moec.errors import NoMatch, UnsupportedError, UsageError
from moec.generation import Prompts, continued, stream
from moec.ir import Graph, Program, Stage
from moec.passes.incremental import continues_text, incremental, logits_of
from moec.passes.runner import Declined, Step, run
from moec.pieces import in_pieces
from moec.pipeline import Changes, Chosen, choose, measured, quantising, until
from moec.quantisation import parse as parse_quant
from moec.quantised import left_wide, quantised_lines
from moec.report import (
    DeclinedLine,
    ErrorLine,
    QuantisedLine,
    Report,
    block_lines,
    describe_graph,
    kernels_of,
    pass_lines,
)
from moec.target import missing
from moec.text import print_graph

if TYPE_CHECKING:
    from moec.codegen.onnx.export import Exported
    from moec.runtime.executor import Executor
    from moec.runtime.manifest import Sample
    from moec.runtime.package import Package
    from moec.target import Target


@dataclass(frozen=True, repr=False)
class CompiledModel:
    """A model compiled for one target; call it as the module it came from.

    torch tensors in give torch tensors out, numpy arrays give numpy arrays. One output comes
    as it is, several come as a dict by name. `package` and `executor` are None where nothing
    was built (`stop_after`, `build=False`), `executor` also where this machine lacks what the
    target needs: such a model can be saved and not called.
    """

    source: Source
    captured: Captured
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    declined: tuple[Declined, ...]
    target: Target
    step: Program | None = None
    package: Package | None = None
    executor: Executor | None = None
    checked: checking.Checked | None = None
    quantised: tuple[QuantisedLine, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises InputError where an input does not fit."""
        package, executor = self._built()
        return call(executor, [port.name for port in package.inputs], args, kwargs)

    def generate(self, prompts: Prompts, **options: Any) -> Any:
        """Continue texts: `prompts` are token ids [B, S], or a list of lists of any lengths.

        Gives the prompts with their new tokens, of the kind that was given; a row that ended
        early is filled up with its last token. Options: `max_new_tokens` (64), `temperature`
        (0: the likeliest token), `top_p`, `top_k`, `seed`, and `stop`, the tokens that end a
        text (those of the model's configuration). Raises InputError where the model does not
        continue text, or an option or a prompt is out of range.
        """
        return continued(self._built()[1], prompts, **options)

    def stream(self, prompts: Prompts, **options: Any) -> Iterator[tuple[int | None, ...]]:
        """As `generate`: the next token of each text as it comes; None where a text has ended."""
        return stream(self._built()[1], prompts, **options)

    def __repr__(self) -> str:
        built = "compiled" if self.package else "not built"
        made = f"{built} for {self.target.name}: {len(self.blocks)} MoE blocks"
        return f"<{self.source.name}, {made}>"

    def reset(self) -> None:
        """Put the state (a static cache) back to what it starts from."""
        self._built()[1].reset()

    def report(self) -> Report:
        """What was recognised, declined, made and measured."""
        program = next(
            (step.program for step in reversed(self.steps) if step.damage), self.captured.program
        )
        package = self.package
        idle = sum(block.parameters - block.active_parameters for block in self.blocks)
        described = describe_graph(program.graph, program.weights)
        kernels: dict[str, int] = {}
        for _, kernel in package.kernels if package else ():
            kernels[kernel] = kernels.get(kernel, 0) + 1
        notes = (*self.captured.fixed, *(package.notes if package else ()))
        checked = self.checked
        if package and missing(self.target):
            notes += (
                f"made for {self.target.name}, which this machine cannot run: not verified, and "
                "saved without samples",
            )
        notes += left_wide(self.steps)
        if checked:
            notes += checked.skipped
        if checked and any(step.damage for step in self.steps):
            notes += (
                "checked against the graph as the passes changed it, and the graph before them "
                "against eager; the distance to the original model is above",
            )
        if checked and checked.strays:
            why = "in 16 bits nearly equal router scores may choose other experts than eager's"
            if self.quantised:
                why = "nearly equal router scores may choose other experts than the graph's"
            notes += (
                f"{checked.strays} of {checked.rows} rows of the outputs are beyond the tolerance: "
                f"{why}",
            )
        if checked and checked.ties:
            notes += (
                f"{checked.ties} of {checked.rows} rows of the outputs differ from eager's and are "
                "right: they choose among exactly equal values, where torch promises no order "
                "and moec takes the first",
            )
        return Report(
            model=self.source.name,
            target=self.target.name,
            active_parameters=described["parameters"] - idle,
            bytes_out=sum(a.nbytes for a in package.arrays.values()) if package else None,
            blocks=block_lines(self.blocks, package.kernels if package else ()),
            declined=tuple(DeclinedLine(d.where, d.reason, d.rule) for d in self.declined),
            passes=pass_lines(self.steps),
            kernels=kernels,
            verification=tuple(
                ErrorLine(name, error, checked.tolerance) for name, error in checked.errors.items()
            )
            if checked
            else (),
            quantised=self.quantised,
            moved=checked.moved if checked else (),
            phases=dict(self.phases),
            notes=notes,
            damage=tuple(step.damage for step in self.steps if step.damage),
            **described,
        )

    def save(self, path: Path | str, *, native: bool = True) -> None:
        """Write the artifact, with the example inputs and their outputs as a sample.

        `native=False` leaves the compiled code out (see `moec run --rebuild`). Raises UsageError
        where `path` holds something that is not an artifact.
        """
        from moec.runtime import artifact

        package = self._package()
        checked = self.checked
        artifact.write(
            package,
            path,
            graph_text=print_graph(self.graph),
            samples=self._samples(package),
            tolerance=checked.tolerance if checked else default_tolerance(self.graph),
            extra={"report": self.report().to_dict()},
            files=self._files(),
            native=native,
        )

    def _files(self) -> dict[str, bytes]:
        from moec.runtime.artifact import STEP

        made = {name: file.read_bytes() for name, file in self.source.files.items()}
        return made | ({STEP: print_graph(self.step.graph).encode()} if self.step else {})

    def export_onnx(
        self,
        path: Path | str,
        ep: str = "cpu",
        opset: int | None = None,
        *,
        moe: str = "auto",
        verify: bool | float = True,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> Exported:
        """Write the whole model as ONNX: `path` (.onnx), and its weights as `path` + ".data".

        `ep` is what it is for: "cpu" and "cuda" (ONNX Runtime), or "portable" (standard operators
        alone). `moe` chooses the form of the blocks: "rows" (sorted rows, one MatMul per expert
        and projection), "op" (com.microsoft.MoE) or "auto": the operator for "cuda" where it can
        express the block, else rows, which were measured to be faster on a CPU. The file is run
        in ONNX Runtime and compared with eager before it gets its name; `verify` is that of
        `moec.compile`. Nothing needs to be built (`build=False`).

        Raises UnsupportedError (everything that has no ONNX form at once), VerificationError,
        TargetError for an `ep` that is unknown or does not compute in the model's dtype, and
        UsageError.
        """
        from moec.codegen.onnx.export import export

        wanted = verify is not False
        limit = tolerance(verify)
        return export(
            self, path, ep, opset, moe=moe, tolerance=limit, verify=wanted, progress=progress
        )

    def _samples(self, package: Package) -> list[Sample]:
        """The example and its outputs; none where there is no example, or it cannot run here."""
        from moec.runtime.executor import Executor
        from moec.runtime.manifest import Sample

        example = dict(zip((p.name for p in package.inputs), self.captured.example, strict=False))
        if self.executor is None or len(example) < len(package.inputs):
            return []
        # One's own executor may be in the middle of a text: its states stay as they are.
        executor = Executor(package) if package.states else self.executor
        return [Sample(_arrays(example), _arrays(executor(example)))]

    @property
    def graph(self) -> Graph:
        """The graph that code was generated from."""
        return self.steps[-1].program.graph

    def _package(self) -> Package:
        if self.package is None:
            raise UsageError("the model was not built: leave out stop_after and build=False")
        return self.package

    def _built(self) -> tuple[Package, Executor]:
        package = self._package()
        if self.executor is None:
            raise UsageError(
                f"this machine lacks {', '.join(missing(self.target))} and cannot run code for "
                f"{self.target.name}: save the model, and load it on a machine that has them"
            )
        return package, self.executor


def compile(
    model: Any,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    target: str | Target = "cpu",
    dtype: str | torch.dtype | None = None,
    opt_level: int = 2,
    passes: Changes = "",
    quant: str | None = None,
    calib: Any = None,
    budget: str = "",
    strict: bool = False,
    verify: bool | float = True,
    fuel: int | None = None,
    stop_after: str | None = None,
    build: bool = True,
    kv_cache: bool = True,
    watch: Callable[[Step], None] | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> CompiledModel:
    """Compile a mixture-of-experts model, whole, for a CPU.

    `model` is a torch module (with example `args` and `kwargs`), an ExportedProgram, the
    folder of a Hugging Face checkpoint, a .pt2 file, or "file.py:factory". Batch and sequence
    vary unless `dynamic_shapes` (torch.export's) says otherwise. `dtype` converts the weights
    first, in place; the module is left in eval mode. `passes` changes the passes of `opt_level`
    ("+a,-b"). `verify` compares the result with eager; a float is the greatest error allowed, as
    a share of the greatest value of an output. `fuel` caps the rewrites. `stop_after` names the
    last pass to run; `build=False` stops before code generation. `kv_cache=False` leaves out
    the code that `generate` runs for one token after the other.

    `quant` stores the weights of experts in few bits: "int8", "int4", each with a block (":32",
    ":64", ":128") and ":asymmetric" if wished, or "mxfp4"; the last step of all.

    Passes that change the model, "+prune-experts(keep=0.5)" or `[PruneExperts(keep=0.5)]`, need
    `calib`: tensors by input name, or the path of an .npz, .safetensors or .txt. `budget`
    ("kl<=0.02") bounds the damage that is measured there; what goes beyond it is undone layer by
    layer or, where `strict`, fails. `verify` then compares with the changed graph.

    Raises CaptureError, UnsupportedError, TargetError, UsageError, BudgetError and
    VerificationError, all of them MoecError.
    """
    clock = _Clock(progress)
    with clock.phase("capture"):
        format = None if quant is None else parse_quant(quant)
        asked = (*choose(opt_level, changes(passes)), *quantising(format))
        chosen = until(asked, stop_after)
        allowed = _allowed(asked, chosen, calib, text("budget", budget), strict)
        builds = build and stop_after is None
        made_for = target_of(target, run=builds and verify is not False)
        limit = tolerance(verify)
        source = cast(open_source(model, *example_inputs(args, kwargs)), dtype)
        captured = capture(
            source.model,
            source.args,
            source.kwargs,
            dynamic_shapes=source.dynamic_shapes if dynamic_shapes is None else dynamic_shapes,
            bounds=source.bounds if dynamic_shapes is None else None,
        )
    if builds and verify is not False and not captured.example and captured.program.graph.inputs:
        raise UsageError(
            f"{source.name} holds no example inputs to verify with: give args, or verify=False"
        )
    with clock.phase("passes"):
        frame = Frame(calib, source.files, allowed, strict)
        steps = tuple(run(captured.program, measured(chosen, frame), fuel=fuel, watch=watch))
        quantised = quantised_lines(steps)
    compiled = CompiledModel(
        source=source,
        captured=captured,
        steps=steps,
        blocks=_blocks(steps),
        declined=tuple(dict.fromkeys(d for step in steps for d in step.declined)),
        target=made_for,
        quantised=quantised,
        phases=clock.seconds,
    )
    if not builds:
        return compiled
    if kv_cache:
        with clock.phase("generation"):
            compiled = _with_step(compiled)
    built = _build(compiled, opt_level, clock)
    return built if verify is False else _verify(built, limit, clock)


def _with_step(compiled: CompiledModel) -> CompiledModel:
    """With a program for tokens that come in pieces, or why there is none."""
    program = compiled.steps[-1].program
    if not continues_text(program.graph):
        return compiled
    try:
        return replace(compiled, step=incremental(program))
    except NoMatch as why:
        declined = Declined("text generation", str(why), "incremental")
        return replace(compiled, declined=(*compiled.declined, declined))


def _allowed(
    asked: Sequence[Chosen], chosen: Sequence[Chosen], calib: Any, budget: str, strict: bool
) -> Budget:
    """The budget, once it is known that the passes have what they need, and need what there is."""
    for pass_ in chosen:
        if isinstance(pass_, Approximate) and calib is None:
            raise UsageError(
                f"{pass_.name} needs calibration data: give --calib FILE (calib=... in Python)"
            )
    if strict and not budget:
        raise UsageError("--strict fails where the budget is exceeded: give --budget too")
    given = [n for n, v in (("calib", calib is not None), ("budget", budget)) if v]
    if given and not any(isinstance(pass_, Approximate) for pass_ in asked):
        raise UsageError(
            f"--{given[0]} is for passes that change the model, and none was asked for; see "
            "moec list passes"
        )
    if calib is not None:
        check_calibration(calib)
    return budget_of(budget)


def _build(compiled: CompiledModel, opt_level: int, clock: _Clock) -> CompiledModel:
    """With code, and ready to run where this machine can run it."""
    with clock.phase("kernels"):
        from moec.codegen.package import build as generate

        program, step = compiled.steps[-1].program, compiled.step
        try:
            package = generate(program, compiled.target, opt_level, step)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}{_not_recognised(compiled.declined)}") from None
        if package.step is not None:
            stop = stop_tokens(compiled.source.model)
            package = replace(package, step=replace(package.step, stop=stop))
        for declined in compiled.declined:
            if declined.rule == "incremental":
                package = replace(package, no_step=declined.reason)
        named = (replace(b, kernel=kernels_of(b.name, package.kernels)) for b in compiled.blocks)
        compiled = replace(compiled, blocks=tuple(named))
    if missing(compiled.target):
        return replace(compiled, package=package)
    with clock.phase("load"):
        from moec.runtime.executor import Executor

        executor = Executor(package)
    return replace(compiled, package=package, executor=executor)


def _not_recognised(declined: Sequence[Declined]) -> str:
    """Experts that were not recognised: what they are written with may have no kernel."""
    experts = [d for d in declined if d.rule == "recognise-experts"]
    lines = dict.fromkeys(f"\n  {d.where}: {d.reason}" for d in experts)
    return f"\nexperts were not recognised, which would compile:{''.join(lines)}" if lines else ""


def _verify(compiled: CompiledModel, limit: float | None, clock: _Clock) -> CompiledModel:
    _, executor = compiled._built()

    def run_afresh(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        executor.reset()
        return executor(inputs)

    with clock.phase("verify"):
        pieces = None
        if compiled.step is not None:
            pieces = (logits_of(compiled.graph).name, partial(in_pieces, executor))
        checked = checking.check(compiled.captured, run_afresh, compiled.steps, limit, pieces)
        executor.reset()
    return replace(compiled, checked=checked)


def _blocks(steps: Sequence[Step]) -> tuple[Block, ...]:
    """The blocks of the last graph that still has bodies of experts in it."""
    last = [step for step in steps if step.stage in (Stage.ATEN, Stage.MOE)][-1]
    return blocks(last.program.graph)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Any]:
    from moec.codegen.package import as_array

    return {name: as_array(torch.as_tensor(tensor)) for name, tensor in tensors.items()}


@dataclass
class _Clock:
    """Tells the phases and keeps how long each took."""

    progress: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
