"""`moec.compile` and what it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moec import check as checking
from moec.blocks import Block, blocks
from moec.calling import call
from moec.capture import Captured, capture
from moec.capture.doors import Source, open_source
from moec.closeness import default_tolerance
from moec.errors import UsageError
from moec.ir import Stage
from moec.passes.runner import Declined, Step, run
from moec.pipeline import choose, until
from moec.report import (
    DeclinedLine,
    ErrorLine,
    Report,
    block_lines,
    describe_graph,
    kernels_of,
    pass_lines,
)
from moec.target import missing as missing_features
from moec.target import parse as parse_target
from moec.text import print_graph

if TYPE_CHECKING:
    from moec.runtime.executor import Executor
    from moec.runtime.package import Package
    from moec.target import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, repr=False)
class CompiledModel:
    """A model compiled for one target; call it as the module it came from.

    torch tensors in give torch tensors out, numpy arrays give numpy arrays. One output comes
    as it is, several come as a dict by name. `package` and `executor` are None where nothing
    was built (`stop_after`, `build=False`).
    """

    source: Source
    captured: Captured
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    declined: tuple[Declined, ...]
    target: Target
    package: Package | None = None
    executor: Executor | None = None
    checked: checking.Checked | None = None
    phases: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises InputError where an input does not fit."""
        package, executor = self._built()
        return call(executor, [port.name for port in package.inputs], args, kwargs)

    def __repr__(self) -> str:
        built = "compiled" if self.package else "not built"
        made = f"{built} for {self.target.name}: {len(self.blocks)} MoE blocks"
        return f"<{self.source.name}, {made}>"

    def reset(self) -> None:
        """Put the state (a static cache) back to what it starts from."""
        self._built()[1].reset()

    def report(self) -> Report:
        """What was recognised, declined, made and measured."""
        program = self.captured.program
        package = self.package
        active = sum(block.parameters - block.active_parameters for block in self.blocks)
        described = describe_graph(program.graph, program.weights)
        kernels: dict[str, int] = {}
        for _, kernel in package.kernels if package else ():
            kernels[kernel] = kernels.get(kernel, 0) + 1
        notes = (*self.captured.fixed, *(package.notes if package else ()))
        checked = self.checked
        if checked and checked.strays:
            notes += (
                f"{checked.strays} of {checked.rows} rows of the outputs are beyond the tolerance: "
                "in 16 bits nearly equal router scores may choose other experts than eager's",
            )
        return Report(
            model=self.source.name,
            target=self.target.name,
            active_parameters=described["parameters"] - active,
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
            phases=dict(self.phases),
            notes=notes,
            **described,
        )

    def save(self, path: Path | str, *, native: bool = True) -> None:
        """Write the artifact. `native=False` leaves the compiled code out (see `moec run
        --rebuild`). Raises UsageError where `path` holds something that is not an artifact."""
        from moec.runtime import artifact, manifest

        package, executor = self._built()
        example = {
            port.name: tensor
            for port, tensor in zip(package.inputs, self.captured.example, strict=True)
        }
        executor.reset()
        outputs = executor(example)
        executor.reset()
        checked = self.checked
        artifact.write(
            package,
            path,
            graph_text=print_graph(self.steps[-1].program.graph),
            samples=[manifest.Sample(_arrays(example), _arrays(outputs))],
            tolerance=checked.tolerance if checked else default_tolerance(self.graph),
            extra={"report": self.report().to_dict()},
            files={name: file.read_bytes() for name, file in self.source.files.items()},
            native=native,
        )

    @property
    def graph(self) -> Any:
        """The graph that code was generated from."""
        return self.steps[-1].program.graph

    def _built(self) -> tuple[Package, Executor]:
        if self.package is None or self.executor is None:
            raise UsageError("the model was not built: leave out stop_after and build=False")
        return self.package, self.executor


def compile(
    model: Any,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    target: str | Target = "cpu",
    dtype: str | torch.dtype | None = None,
    opt_level: int = 2,
    passes: str = "",
    verify: bool | float = True,
    fuel: int | None = None,
    stop_after: str | None = None,
    build: bool = True,
    watch: Callable[[Step], None] | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> CompiledModel:
    """Compile a mixture-of-experts model, whole, for a CPU.

    `model` is a torch module (with example `args` and `kwargs`), an ExportedProgram, the
    folder of a Hugging Face checkpoint, a .pt2 file, or "file.py:factory". Batch and sequence
    vary unless `dynamic_shapes` (torch.export's) says otherwise. `dtype` converts the weights
    first, in place. `passes` changes the passes of `opt_level` ("+a,-b"). `verify` compares the
    result with eager; a float is the greatest error allowed. `fuel` caps the rewrites.
    `stop_after` names the last pass to run; `build=False` stops before code generation.

    Raises CaptureError, UnsupportedError, TargetError, UsageError and VerificationError, all
    of them MoecError.
    """
    clock = _Clock(progress)
    with clock.phase("capture"):
        chosen = until(choose(opt_level, passes), stop_after)
        made_for = parse_target(target) if isinstance(target, str) else target
        tensors = (args,) if isinstance(args, torch.Tensor) else tuple(args)
        source = open_source(model, tensors, kwargs)
        source = _cast(source, dtype)
        captured = capture(
            source.model,
            source.args,
            source.kwargs,
            dynamic_shapes=source.dynamic_shapes if dynamic_shapes is None else dynamic_shapes,
            bounds=source.bounds if dynamic_shapes is None else None,
        )
    with clock.phase("passes"):
        steps = tuple(run(captured.program, chosen, fuel=fuel, watch=watch))
    compiled = CompiledModel(
        source=source,
        captured=captured,
        steps=steps,
        blocks=_blocks(steps),
        declined=tuple(dict.fromkeys(d for step in steps for d in step.declined)),
        target=made_for,
        phases=clock.seconds,
    )
    if stop_after is not None or not build:
        return compiled
    return _build(compiled, opt_level, verify, clock)


def _build(
    compiled: CompiledModel, opt_level: int, verify: bool | float, clock: _Clock
) -> CompiledModel:
    with clock.phase("kernels"):
        from moec.codegen.package import build as generate

        package = generate(compiled.steps[-1].program, compiled.target, opt_level)
        named = (replace(b, kernel=kernels_of(b.name, package.kernels)) for b in compiled.blocks)
        compiled = replace(compiled, blocks=tuple(named))
    if missing := missing_features(compiled.target):
        if verify is not False:
            raise UsageError(
                f"this machine lacks {', '.join(missing)}, so the result for "
                f"{compiled.target.name} cannot be verified here: switch verification off"
            )
        return replace(compiled, package=package)
    with clock.phase("load"):
        from moec.runtime.executor import Executor

        executor = Executor(package)
    built = replace(compiled, package=package, executor=executor)
    if verify is False:
        return built
    with clock.phase("verify"):
        tolerance = None if verify is True else float(verify)

        def fresh(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
            executor.reset()
            return executor(inputs)

        checked = checking.check(built.captured, fresh, built.steps, tolerance)
        executor.reset()
    return replace(built, checked=checked)


def _blocks(steps: Sequence[Step]) -> tuple[Block, ...]:
    """The blocks of the last graph that still has bodies of experts in it."""
    last = [step for step in steps if step.stage in (Stage.ATEN, Stage.MOE)][-1]
    return blocks(last.program.graph)


def _cast(source: Source, dtype: str | torch.dtype | None) -> Source:
    if dtype is None:
        return source
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None:
        raise UsageError(f"dtype {dtype}: models are float32, bfloat16 or float16")
    if not isinstance(source.model, torch.nn.Module):
        raise UsageError("the weights of an exported program cannot be converted: export it anew")
    model = source.model.to(wanted)

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(wanted) if floating else value

    args = torch.utils._pytree.tree_map(cast, source.args)
    kwargs = torch.utils._pytree.tree_map(cast, dict(source.kwargs))
    return replace(source, model=model, args=args, kwargs=kwargs)


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
        yield
        self.seconds[name] = time.perf_counter() - start
