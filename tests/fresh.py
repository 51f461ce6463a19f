"""Runs Python programs in forks of a process that has imported the libraries already.

Importing torch, TVM and transformers takes longer than most examples. So one process imports them
and does nothing else; each program runs in a fork of it, as `__main__`, with its own arguments,
folder, environment, output and process group, and ends as Python ends. These start Python as usual:
tests of the imports themselves, of variables that libraries read while they are imported, of the
commands of a shell, and of programs that start ranks.

The process is `python -m tests.fresh SOCKET`. A fork has one thread, so the process must have one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# All that can be imported without a thread: onnxruntime starts one.
IMPORTS = (
    "moec.api",
    "moec.capture",
    "moec.dynamo",
    "moec.model.build",
    "moec.verify.check",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.export",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
_INTEGER = 4  # bytes
_LIMIT = 600.0
"""Seconds after which a program and the processes that it started are killed."""


@dataclass(frozen=True)
class Program:
    """A program's text, its file if it has one, its arguments, and whether a UserWarning is an
    error."""

    text: str
    file: str = ""
    arguments: tuple[str, ...] = ()
    strict: bool = False


def moec_command(*words: str) -> Program:
    """`moec WORDS` as a program."""
    return Program("from moec.__main__ import main\nmain()\n", arguments=words)


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


class Warm:
    """The process that has imported the libraries."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            command = [sys.executable, "-m", "tests.fresh", str(other.fileno())]
            root = Path(__file__).resolve().parents[1]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], cwd=root)

    def run(self, program: Program, folder: Path, limit: float = _LIMIT) -> Result:
        """Run a program in `folder`, with the environment as it is now.

        Raises TimeoutError after `limit` seconds; then all processes of the program are killed.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            request = {"program": asdict(program), "cwd": str(folder), "env": dict(os.environ)}
            content = json.dumps(request).encode()
            output = [out.fileno(), err.fileno()]
            socket.send_fds(self._socket, [_bytes(len(content))], output)
            self._socket.sendall(content)
            child = _integer(self._socket)
            self._socket.settimeout(limit)
            try:
                code = _integer(self._socket)
            except TimeoutError:
                os.killpg(child, signal.SIGKILL)
                self._socket.settimeout(None)
                _integer(self._socket)
                raise TimeoutError(f"the program ran longer than {limit:g} s") from None
            self._socket.settimeout(None)
            texts = [file.seek(0) or file.read().decode() for file in (out, err)]
        return Result(code, *texts)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def _bytes(number: int) -> bytes:
    return number.to_bytes(_INTEGER, "little", signed=True)


def _integer(connection: socket.socket) -> int:
    content = connection.recv(_INTEGER, socket.MSG_WAITALL)
    if len(content) < _INTEGER:
        raise EOFError("the process with the imports has ended")
    return int.from_bytes(content, "little", signed=True)


def _serve(connection: socket.socket) -> tuple[dict[str, object], Sequence[int]] | None:
    """In a fork: its request and the descriptors of its output. None after the last request."""
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, _INTEGER, 2)
        if not head:
            return None
        content = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            return json.loads(content), descriptors
        os.setpgid(child, child)
        connection.sendall(_bytes(child))
        for descriptor in descriptors:
            os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(_bytes(code))


def _become(request: dict[str, object], descriptors: Sequence[int]) -> None:
    """The rest of this process is the program."""
    import numpy as np

    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    tempfile.tempdir = None
    np.random.seed()
    program = Program(**request["program"])  # type: ignore[arg-type]
    sys.argv[:] = [program.file, *program.arguments]
    sys.path[0] = str(Path(program.file).parent) if program.file else ""
    if program.strict:
        warnings.simplefilter("error", UserWarning)
    main = types.ModuleType("__main__")
    main.__dict__.update({"__file__": program.file} if program.file else {})
    sys.modules["__main__"] = main
    exec(compile(program.text, program.file or "<string>", "exec"), main.__dict__)


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        for name in IMPORTS:
            importlib.import_module(name)
        gc.freeze()
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
        request = _serve(connection)
    if request:
        _become(*request)


if __name__ == "__main__":
    main()
