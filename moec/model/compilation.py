"""What a compilation results in, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moec.capture import Captured
from moec.capture.source import Source
from moec.ir.graph import Program
from moec.passes.core.runner import Declined, PassResult
from moec.report.data import Block, QuantisedLine
from moec.runtime.package import RecordedLayer, RouterPorts
from moec.verify.check import Checked

if TYPE_CHECKING:
    from moec.model.forms import ModelForm
    from moec.runtime.call.executor import Executor
    from moec.runtime.package import Package
    from moec.target.cuda import CudaTarget
    from moec.target.named import AnyTarget


@dataclass(frozen=True, repr=False)
class Compilation:
    """A model compiled for one target.

    `programs` are the functions of the model besides `main`, such as `decode` (see
    `moec.runtime.package`), and `sides` the forms of the programs `side_N`; `no_decode` is the
    reason where there is no `decode`. `package` and `executor` are None where nothing was built
    (`stop_after`, `build=False`); `executor` is also None where this machine lacks features of the
    target, and the model can then be saved but not called. `for_gpu` is a second package for the
    GPU target in `beside`; calls use the package for the CPU.
    """

    source: Source
    captured: Captured
    pass_results: tuple[PassResult, ...]
    blocks: tuple[Block, ...]
    declined: tuple[Declined, ...]
    target: AnyTarget
    sides: tuple[ModelForm, ...] = ()
    programs: Mapping[str, Program] = field(default_factory=dict)
    router_ports: tuple[RouterPorts, ...] = ()
    recorded: tuple[RecordedLayer, ...] = ()
    no_decode: str = ""
    package: Package | None = None
    beside: CudaTarget | None = None
    for_gpu: Package | None = None
    executor: Executor | None = None
    checked: Checked | None = None
    quantised: tuple[QuantisedLine, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def target_name(self) -> str:
        """The names of all targets of the model, such as cpu,cuda:sm_80."""
        return ",".join(target.name for target in (self.target, self.beside) if target)
