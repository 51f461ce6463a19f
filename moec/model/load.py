"""`moec.load`: an artifact as a model to call. Needs neither torch nor the compiler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Never

from moec.errors import UsageError
from moec.model.generate import TextModel, Writer
from moec.runtime.artifact.artifact import Artifact, read
from moec.runtime.call.arguments import Choices, call, routed, routers
from moec.runtime.call.executor import Executor, record_routing, start
from moec.runtime.call.recorder import Recorder
from moec.runtime.device.device import device_of, only_for
from moec.runtime.process.pool import set_pool_threads
from moec.runtime.text.prompt import Tokenizer, load_tokenizer


@dataclass(frozen=True, repr=False)
class LoadedModel(TextModel):
    """A compiled model loaded from its artifact. Call it like the result of `moec.compile`."""

    path: Path
    artifact: Artifact
    executor: Executor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises InputError where an input does not fit."""
        names = [port.name for port in self.artifact.package.main.inputs]
        return call(self.executor, names, args, kwargs)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """See `CompiledModel.tokenizer`."""
        return load_tokenizer(self.artifact.files)

    @property
    def _writer(self) -> Writer:
        return Writer(self.executor, lambda: self.tokenizer)

    def routers(self, *args: Any, **kwargs: Any) -> Choices:
        """See `CompiledModel.routers`."""
        return routers(self.executor, args, kwargs)

    def routed(self, choices: Choices, *args: Any, **kwargs: Any) -> Any:
        """See `CompiledModel.routed`."""
        return routed(self.executor, choices, args, kwargs)

    def record_routing(self) -> AbstractContextManager[Recorder]:
        """See `CompiledModel.record_routing`."""
        return record_routing(self.executor)

    def __reduce__(self) -> Never:
        """Raises UsageError: machine code can be neither pickled nor copied."""
        raise UsageError(
            "a loaded model is machine code in the memory of this process, which can be neither "
            f"pickled nor copied: use moec.load({str(self.path)!r}) in the other process"
        )

    def __repr__(self) -> str:
        package = self.artifact.package
        names = ", ".join(port.name for port in package.main.inputs)
        return f"<{self.path.name} for {package.target_name}: takes {names}>"

    def reset(self) -> None:
        """Reset the state (a static cache) to its first contents."""
        self.executor.reset()

    def profile(self, prompt: str | None = None, inputs: Any = None, **options: Any) -> Any:
        """See `CompiledModel.profile`. Needs torch and the compiler."""
        from moec.model.stored import stored_graph
        from moec.report.profile.run import profile_model

        return profile_model(
            self.path.name,
            self.artifact.package,
            lambda name: stored_graph(self.path, name, self.artifact.graphs[name]),
            None if prompt is None else self.tokenizer.encode(prompt),
            inputs,
            **options,
        )

    def report(self) -> Any:
        """What was recognised, declined, generated and measured when the model was compiled."""
        from moec.report.report import Report

        return Report.of_dict(self.artifact.manifest.extra["report"])


def load(
    path: Path | str,
    device: str | None = None,
    *,
    copies: bool = False,
    signed_by: Path | str | None = None,
    copy: bool = False,
    memory: int | str | None = None,
    texts: int = 1,
    room: int = 4096,
    threads: int | None = None,
) -> LoadedModel:
    """The model in the artifact at `path`, to run on `device`: cpu, cuda or cuda:1. The default is
    the CPU, or the first GPU where the model was compiled for GPUs only.

    A model on a GPU takes and returns torch tensors on that GPU; with `copies`, arrays or tensors
    in CPU memory. `signed_by` is the file of the public key by which the artifact must be signed
    (`moec sign`); without one, the origin of the code that it runs is not checked. The file is
    mapped: writing to it, instead of renaming another over it, makes later calls fail. With `copy`
    it is read into memory that belongs to this process, and may then change.

    `memory` ("4GiB", or bytes) is the most memory that this process may take with the model, on a
    CPU: experts that do not fit stay in the file, and are read when a token chooses them. No bit of
    a result depends on it. It includes the caches of `texts` of at most `room` tokens each; more
    are refused. Needs a model compiled with `store=True`, the default for large ones.

    `threads` is the number of threads of kernels, one pool for all models of the process; by
    default one for each processor that the process may use. No bit of a result depends on it.

    Raises UsageError where `path` is no path, the key cannot be used, or `threads` is another
    number than that of a model loaded before, ArtifactError where any part of the artifact is
    damaged, not signed with the key, or without code for the device, and TargetError where this
    machine cannot run it.
    """
    if not isinstance(path, str | Path):
        raise UsageError(f"{path!r} is not the path of an artifact: give text or a Path")
    on = None if device is None else device_of(device, copies=copies)
    if threads is not None:
        set_pool_threads(threads)
    opened = read(path, signed_by=signed_by, copy=copy)
    opened = opened if on is None else only_for(opened, on)
    if memory is None:
        return LoadedModel(Path(path), opened, start(opened, on))
    from moec.runtime.expert_store.start import TextRoom, start_within
    from moec.runtime.process.byte_sizes import bytes_of

    if copy:
        raise UsageError(
            "memory leaves experts in the file, and copy reads all of it: leave one out"
        )
    executor = start_within(opened, bytes_of(memory), room=TextRoom(texts, room))
    return LoadedModel(Path(path), opened, executor)
