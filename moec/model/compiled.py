"""The result of `moec.compile`: a model to call, inspect, save and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import torch

from moec.arguments import tolerance
from moec.errors import SetupError, UsageError, VerificationError
from moec.ir.graph import Graph, Module
from moec.ir.text import print_graph
from moec.model.compilation import Compilation
from moec.model.generate import TextModel, Writer
from moec.oracle.tolerance import default_tolerance
from moec.report.units import counted
from moec.runtime.call.arguments import Choices, bind, call, routed, routers
from moec.runtime.call.executor import record_routing
from moec.runtime.call.recorder import Recorder
from moec.runtime.package import MAIN
from moec.runtime.text.prompt import Tokenizer, load_tokenizer
from moec.target.named import missing_features

if TYPE_CHECKING:
    from moec.export.onnx import Exported
    from moec.report.profile.profile import ModelProfile
    from moec.report.report import Report
    from moec.runtime.artifact.artifact import Sample
    from moec.runtime.call.executor import Executor
    from moec.runtime.package import Package


@dataclass(frozen=True, repr=False)
class CompiledModel(TextModel, Compilation):
    """A model compiled for one target; call it like the module that it was compiled from.

    torch tensors as inputs give torch tensors as results, numpy arrays give numpy arrays. The
    result has the module's type: a tensor, a tuple, a dataclass, a ModelOutput, with None and
    numbers as in the example's result. A model from a checkpoint's folder returns what its artifact
    does: a single tensor, or several in a dict by name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments bind as those of the module's forward. Raises InputError where
        one does not fit, or has another value than that which the example fixed."""
        package, executor = self.ready()
        names = [port.name for port in package.main.inputs]
        structure, signature = self.captured.structure, self.captured.signature
        inputs = (signature.bind if signature else bind)(names, args, kwargs)
        if self.source.unnamed or structure.count != len(package.main.outputs):
            return call(executor, names, (), inputs)
        return structure.rebuild(list(executor(inputs).values()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Converts text to tokens and back: `encode`, `decode`, and `chat` by the model's chat
        template.

        Raises ArtifactError where the model has no tokenizer.
        """
        return load_tokenizer(self.source.files)

    @property
    def _writer(self) -> Writer:
        return Writer(self.ready()[1], lambda: self.tokenizer)

    def routers(self, *args: Any, **kwargs: Any) -> Choices:
        """The choices of routers that read no hidden state, before the model runs.

        Returns {layer: {"experts": [T, k], "weights": [T, k]}}. Takes the inputs that these routers
        read. Given only some of them, returns the layers whose routers need no others, so that a
        loop over timesteps computes choices that depend on the prompt only once.

        Needs `passes="+hoist-routers"`. Raises InputError where an input does not fit, or no router
        could be hoisted.
        """
        return routers(self.ready()[1], args, kwargs)

    def routed(self, choices: Choices, *args: Any, **kwargs: Any) -> Any:
        """Run the model with choices from `routers`, without computing those routers."""
        return routed(self.ready()[1], choices, args, kwargs)

    def record_routing(self) -> AbstractContextManager[Recorder]:
        """Record which experts are chosen: `with m.record_routing() as routing: m.generate(...)`.
        Afterwards `routing.trace()` is a `RoutingTrace`, which `save_trace` writes for `moec plan`.

        Needs `record_routing=True`. Raises InputError where the model was compiled without it.
        """
        return record_routing(self.ready()[1])

    def __repr__(self) -> str:
        built = "compiled" if self.package else "not built"
        summary = f"{built} for {self.target_name}: {counted(len(self.blocks), 'MoE block')}"
        return f"<{self.source.name}, {summary}>"

    def __reduce__(self) -> Never:
        """Raises UsageError: machine code can be neither pickled nor copied."""
        raise UsageError(
            "a compiled model is machine code in the memory of this process, which can be "
            "neither pickled nor copied: save it, and use moec.load on the artifact"
        )

    def reset(self) -> None:
        """Reset the state (a static cache) to its first contents."""
        self.ready()[1].reset()

    def report(self) -> Report:
        """What was recognised, declined, generated and measured."""
        from moec.model.summary import report_of

        return report_of(self)

    def profile(
        self,
        prompt: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ModelProfile:
        """Where the time goes: each kernel of the model in prefill and decode, with its work, by
        layer and by kind, as data that prints as tables.

        Profiles the text `prompt` and its likeliest continuation, or random tokens, or a call with
        `inputs` by name. Options: `batch` (1), `prompt_tokens` (512, without a prompt),
        `new_tokens` (32), `rounds` (5), and `progress`, called with the name of each phase.

        Raises UsageError where there are no inputs and the model does not continue text, or where
        it is for GPUs.
        """
        from moec.report.profile.run import profile_model

        return profile_model(
            self.source.name,
            self.ready()[0],
            lambda name: self.module[name].graph,
            None if prompt is None else self.tokenizer.encode(prompt),
            inputs,
            **options,
        )

    def save(
        self,
        path: Path | str,
        *,
        native: bool = True,
        overwrite: bool = True,
        keep_passes: bool = False,
    ) -> None:
        """Write the artifact, with the example inputs and their outputs as a sample.

        `native=False` leaves the compiled code out (see `moec run --rebuild`). `keep_passes` adds
        the graph after each pass, with lines of the user's code, for `moec explore`. Raises
        UsageError where `path` holds something that is not an artifact, or, without `overwrite`,
        anything.
        """
        from moec.report.pass_graphs.stored import passes_part
        from moec.runtime.artifact import artifact

        package, report = self._package(), self.report()
        files = dict(self.source.files)
        if keep_passes:
            files[artifact.PASSES] = passes_part(self.pass_results, report.declined)
        checked = self.checked
        with self.source.memory.reading():
            artifact.write(
                package,
                path,
                graphs={name: print_graph(self.module[name].graph) for name in self.module},
                samples=self._samples(package),
                tolerance=checked.tolerance if checked else default_tolerance(self.graph),
                extra={"report": report.to_dict()},
                files=files,
                native=native,
                overwrite=overwrite,
                for_gpu=self.for_gpu,
            )

    def export_onnx(
        self,
        path: Path | str,
        ep: str = "cpu",
        quant: str | None = None,
        opset: int | None = None,
        *,
        moe: str = "auto",
        cache: bool | None = None,
        verify: bool | float = True,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> Exported:
        """Write the whole model as ONNX: `path` (.onnx), and its weights as `path` + ".data".

        `ep` is the execution provider: "cpu" or "cuda" (ONNX Runtime), or "portable" (standard
        operators only). `moe` chooses the form of the blocks: "rows" (sorted rows, one product per
        expert and projection), "op" (com.microsoft.MoE, or QMoE for quantised experts), or "auto":
        the one that was measured to be faster. That is the operator for "cuda", and for quantised
        experts on a CPU, where it can express the block; else rows.

        `quant` rounds the weights of experts to a format of `moec.compile`, which also takes
        calibration data; leave it out where the model was compiled with one.

        With `cache` the file takes past keys and values and returns present ones (inputs
        attention_mask, past_key_values.N.key and .value; outputs present.N.key and .value; see
        `moec.passes.decode.kv_inputs`), for texts of any lengths, padded anywhere. By default a
        model that continues text has a cache where possible; otherwise the report has the reason.

        The file is run in ONNX Runtime and compared with eager before it is renamed to `path`; with
        quantised weights, the reference is float32. `verify` is that of `moec.compile`. The model
        need not be built (`build=False`).

        Raises UnsupportedError (listing everything without an ONNX form), VerificationError,
        TargetError for an `ep` that is unknown or does not compute in the model's dtype, and
        UsageError.
        """
        from moec.export.checkpoint import Transformed
        from moec.export.onnx import export

        compare = verify is not False
        limit = tolerance(verify)
        model = Transformed(self.source.name, self.captured, self.pass_results, self.quantised)
        with self.source.memory.reading():
            return export(
                model, path, ep, quant, opset, moe=moe, cache=cache, tolerance=limit,
                verify=compare, progress=progress,
            )  # fmt: skip

    def _samples(self, package: Package) -> list[Sample]:
        """The example and its outputs; empty where there is no example, where this machine cannot
        run the code, where it is for a GPU, because `moec run --check` runs on a CPU, or where
        eager's have NaN. Raises VerificationError where those of the code alone have."""
        from moec.codegen.module_builder import has_nan
        from moec.runtime.artifact.artifact import Sample
        from moec.runtime.call.executor import Executor

        names = [port.name for port in package.main.inputs]
        example = dict(zip(names, self.captured.example, strict=False))
        if self.executor is None or len(example) < len(names) or package.gpu is not None:
            return []
        # The model's own executor may be in the middle of a text, whose states must not change.
        executor = Executor(package) if package.states else self.executor
        outputs = executor(example)
        if wrong := [name for name, tensor in outputs.items() if has_nan(tensor)]:
            if any(map(has_nan, self.captured.eager(*self.captured.example))):
                return []
            raise VerificationError(
                f"{wrong[0]} holds NaN for the example, and eager's has none: report it"
            )
        return [Sample(_arrays(example), _arrays(outputs))]

    @property
    def graph(self) -> Graph:
        """The graph that code was generated from."""
        return self.module.main.graph

    @property
    def module(self) -> Module:
        """The programs that code is generated from, by name."""
        return Module({MAIN: self.pass_results[-1].program, **self.programs})

    def _package(self) -> Package:
        if self.package is None:
            raise UsageError("the model was not built: leave out stop_after and build=False")
        return self.package

    def ready(self) -> tuple[Package, Executor]:
        """The package and its executor. Raises UsageError where this machine cannot run it."""
        package = self._package()
        if self.executor is None and not package.has_code:
            raise UsageError(
                f"the target {self.target.name!r} generates no code, so the model cannot be run: "
                "compile it for another target"
            )
        if self.executor is None:
            raise SetupError(
                f"this machine lacks {', '.join(missing_features(self.target))} and cannot run "
                f"code for {self.target.name}: save the model, and load it on a machine that has "
                "them"
            )
        return package, self.executor


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Any]:
    from moec.codegen.module_builder import as_array

    return {name: as_array(torch.as_tensor(tensor)) for name, tensor in tensors.items()}
