"""What `moec compile` is to do, and the checks that come before minutes of work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moec.cache import Store
from moec.commands.compilation.checkpoint_key import CheckpointKey, checkpoint_key
from moec.commands.options.files import check_folder, check_writable
from moec.errors import SetupError, UsageError
from moec.options import compile_options
from moec.passes.core.names import check_last
from moec.target.named import parse_both, parse_for_ranks


@dataclass(frozen=True)
class CompileRequest:
    """What `moec compile` is asked for: `options` are those of `moec.compile`, as they were given
    on the command line, the rest what is written and printed."""

    model: str
    output: Path | None
    dump_ir: Path | None
    emit: Path | None
    keep_passes: bool
    plan_file: Path | None
    dry_run: bool
    full: bool
    as_json: bool
    quiet: bool
    force: bool
    options: Mapping[str, Any]

    @property
    def builds(self) -> bool:
        """Whether code is generated."""
        return not (self.dry_run or self.options["stop_after"])

    @property
    def silent(self) -> bool:
        """Whether no progress is shown: JSON goes to stdout, and progress only to a terminal."""
        return self.quiet or (self.as_json and not sys.stderr.isatty())

    @property
    def verified(self) -> float | bool | str:
        """The tolerance; False where nothing can be or is to be verified."""
        return self.options["verify"] if self.builds else False


def request_of(values: Mapping[str, Any]) -> CompileRequest:
    """The request of the command's options by name."""
    options = {name: values[name] for name in compile_options() if name in values}
    others = (field.name for field in fields(CompileRequest) if field.name != "options")
    return CompileRequest(**{name: values[name] for name in others}, options=options)


def check(request: CompileRequest) -> None:
    """Raises MoecError for options that exclude one another, and what could not be written."""
    from moec.sources.memory.budget import allowed_bytes

    _check_output(request)
    for option, folder in (("--dump-ir", request.dump_ir), ("--emit", request.emit)):
        if folder is not None:
            check_folder(folder, f"{option} {folder}")
    if request.emit is not None and not (request.builds and "cuda" in request.options["target"]):
        raise UsageError("--emit writes GPU code: give -o and a GPU, such as --target cuda:sm_80")
    if request.full and (request.quiet or request.as_json):
        raise UsageError("--report is for people: leave it out with --quiet and --json")
    parse_both(request.options["target"])
    allowed_bytes(request.options["memory"])
    if request.options["stop_after"] is not None:
        check_last(request.options["stop_after"])
    if request.plan_file is not None:
        _check_plan(request, request.plan_file)


def cache_key(request: CompileRequest, store: Store) -> CheckpointKey | None:
    """The key of the artifact in the cache; None where it is not cached, as with options that read
    or write other files."""
    files = (request.dump_ir, request.emit, request.plan_file)
    if store.folder is None or not request.builds or any(files):
        return None
    options = compile_options()
    if any(value for name, value in request.options.items() if options[name].reads):
        return None
    key = {name: value for name, value in request.options.items() if options[name].artifact}
    return checkpoint_key(request.model, {**key, "keep_passes": request.keep_passes})


def _check_plan(request: CompileRequest, plan_file: Path) -> None:
    if not plan_file.is_file():
        raise SetupError(f"{plan_file} does not exist")
    values = request.options
    parse_for_ranks(values["target"])
    others = [
        name
        for name, option in compile_options().items()
        if option.flags and not option.ranks and values[name] != option.default
    ]
    refused = (request.dump_ir, request.emit, request.keep_passes, {*others} - {"target", "verify"})
    if not request.builds or any(refused):
        raise UsageError(
            "--plan accepts only MODEL, -o, --target and --verify: leave out the other options"
        )


def _check_output(request: CompileRequest) -> None:
    output, ranks = request.output, request.plan_file is not None
    if not request.builds:
        return
    if output is None:
        raise UsageError("name the artifact with -o OUT.moec, or compile nothing with --dry-run")
    from moec.runtime.artifact.container import replaceable

    if output.exists() and not request.force:
        raise SetupError(f"{output} exists; --force replaces it")
    if output.exists() and not ranks and not replaceable(output):
        raise SetupError(
            f"{output} is not an artifact, and --force replaces artifacts only: choose another name"
        )
    if not output.is_dir():
        check_writable(output, str(output))
