"""The command line: `moec COMMAND`. The module of a command is imported when the command runs.

Exit codes are those of moec.errors.Exit. MOEC_DEBUG=1 shows the traceback of any error.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any, TextIO

import click

from moec.errors import Exit, MoecError, UsageError
from moec.extras import missing_extra
from moec.files.os_errors import reason
from moec.files.printable import printable
from moec.spelling import did_you_mean

# Their descriptions, so that `moec --help` and completion need not import the commands.
COMMANDS = {
    "compile": ("moec.commands.compile", "Compile a model into an artifact."),
    "run": ("moec.commands.run", "Run an artifact or a model on inputs, or on a prompt."),
    "chat": ("moec.serving.chat.chat", "Chat with an artifact or a model in the terminal."),
    "serve": ("moec.serving.serve", "Serve artifacts or models over HTTP, as OpenAI does."),
    "export": ("moec.commands.export", "Write a model as an ONNX or a GGUF file."),
    "convert": ("moec.commands.convert", "Quantise a checkpoint for other runtimes."),
    "optimize": (
        "moec.commands.compilation.optimize",
        "Choose the formats of weights for a memory or a quality.",
    ),
    "verify": ("moec.commands.verify", "Check an artifact without running it."),
    "sign": ("moec.commands.sign", "Sign an artifact, so that who runs it can check its author."),
    "inspect": ("moec.commands.inspect", "Show the MoE blocks of a model or an artifact."),
    "explore": (
        "moec.commands.execution.explore",
        "Look inside a model or an artifact in a browser.",
    ),
    "bisect": ("moec.commands.bisect", "Find the first rewrite that changes a model's numbers."),
    "bench": ("moec.commands.bench", "Time prefill and decode, and compare with other runtimes."),
    "eval": (
        "moec.commands.execution.eval",
        "Measure perplexity, KL and accuracy of models.",
    ),
    "profile": ("moec.commands.execution.profile", "Time each kernel of an artifact."),
    "compare": (
        "moec.commands.execution.compare",
        "Compare two artifacts, or a model and an artifact.",
    ),
    "plan": ("moec.commands.plan", "Plan how a model runs on many devices."),
    "routing": ("moec.commands.routing", "Show which experts a recorded routing chose."),
    "doctor": ("moec.commands.doctor", "Check this machine and say how to fix what is wrong."),
    "cache": ("moec.commands.cache", "Show, prune or clear the cache of compiled code and models."),
    "list": ("moec.commands.list", "List passes, targets, models or formats."),
}
_USERS_OWN = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EMFILE EIO ENAMETOOLONG".split()
    if hasattr(errno, name)  # not every system has all
}


class LazyGroup(click.Group):
    """A group whose commands are imported on first use, and whose errors are one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # Ctrl-C waits until the end: numpy would give it as its own ImportError, after a traceback
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if odd := next((arg for arg in args if "\0" in arg), ""):
            raise UsageError(f"the argument {odd!r} contains a zero byte: remove it")
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = did_you_mean(args[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            raise UsageError(f"no such command {args[0]!r}{near}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, doc) for name, (_, doc) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=doc)
            for name, (_, doc) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Like click's `main`, with moec's exit codes."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except Exception as error:
            if os.environ.get("MOEC_DEBUG") == "1":
                raise
            code, message = verdict(error)
            if message:
                click.echo(printable(_shortened(message)), err=True)
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def verdict(error: Exception) -> tuple[int, str]:
    """The exit code and the one-line message of an error."""
    match error:
        case MoecError():
            return error.exit_code, f"error: {error}"
        case click.exceptions.NoArgsIsHelpError():
            return Exit.USAGE, error.format_message()
        case click.UsageError():
            hint = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            return Exit.USAGE, f"error: {error.format_message().rstrip('.')}{hint}"
        case click.ClickException():
            return Exit.SETUP, f"error: {error.format_message()}"
        case click.Abort():
            return Exit.INTERRUPTED, "interrupted"
        case ModuleNotFoundError() if extra := missing_extra(error):
            return Exit.SETUP, f"error: {extra}"
        case MemoryError() | OSError() | RuntimeError() if _lacks_memory(error):
            return Exit.SETUP, "error: this machine has too little free memory for the model"
        case Exception() if os.strerror(errno.EMFILE) in str(error):
            name = getattr(error, "filename", None) or "this process"
            return Exit.SETUP, f"error: {name}: {reason(OSError(errno.EMFILE, ''))}"
        case OSError() if error.errno in _USERS_OWN or _is_users(error.filename):
            return Exit.SETUP, f"error: {error.filename or 'output'}: {reason(error)}"
    name = type(error).__name__
    line = " ".join(str(error).split())
    remedy = "this is a bug in moec; set MOEC_DEBUG=1 to see the traceback"
    return Exit.DEFECT, f"{name}: {line}\n{remedy}"


def _lacks_memory(error: Exception) -> bool:
    """Also where the loader of a library, an allocator of torch or a new thread says so."""
    words = ("failed to map segment", "annot allocate memory", "can't allocate memory",
             "can't start new thread")  # fmt: skip
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def _is_users(filename: object) -> bool:
    """Whether a file does not belong to moec."""
    return isinstance(filename, str) and not filename.startswith(os.path.dirname(__file__))


def _shortened(message: str) -> str:
    """The message with the middle of very long words cut."""
    return re.sub(r"(\S{100})\S{200,}(\S{50})", r"\1…\2", message)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Completion: eval "$(_MOEC_COMPLETE=bash_source moec)" in ~/.bashrc '
    "(zsh_source, fish_source likewise).",
)
@click.version_option(version("moec"), "-V", "--version", message="moec %(version)s")
def cli() -> None:
    """The compiler for mixture-of-experts models."""


def main() -> None:
    if threading.current_thread() is threading.main_thread():
        # SIGTERM unwinds like Ctrl-C, so that no partial files are left.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.showwarning = _show_warning
    _open_streams()
    if hasattr(signal, "SIGBUS"):  # Python's own handlers run after the read, which never ends
        ctypes.CDLL(None).signal(signal.SIGBUS, _AT_LOST_BYTES)
    try:
        cli(prog_name="moec")
    finally:
        gc.freeze()  # or Python would visit every object of torch and of a model once more


def _end_for_lost_bytes(_: int) -> None:
    """Of a mapped file that was cut, which a kernel or a digest reads."""
    rule = "to replace an artifact in use, write a new file and rename it over the old one"
    os.write(2, f"error: a file was cut while the model in it is in use: {rule}\n".encode())
    os._exit(1)


_AT_LOST_BYTES = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end_for_lost_bytes)


def _open_streams() -> None:
    """Opens closed standard streams on the null device: otherwise a file that is opened later would
    get their numbers, and libraries would print into it. Characters that a terminal cannot encode
    are written as escapes."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning about the cache in one sentence, like errors; others with their code line."""
    from moec.cache import CacheWarning

    if issubclass(category, CacheWarning):
        click.echo(printable(f"warning: {message}"), err=True)
    else:
        shown = warnings.formatwarning(message, category, filename, lineno, line)
        click.echo(printable(shown), err=True)


if __name__ == "__main__":
    main()
