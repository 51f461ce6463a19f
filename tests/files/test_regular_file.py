"""Every file of a folder, an artifact or a key that is a pipe, a socket, a device, a folder, or a
link to itself or out of its folder: one sentence, soon."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moec.__main__ import verdict
from moec.errors import MoecError
from moec.files.adapter import read_adapter
from moec.files.gguf import read_header
from moec.files.regular_file import open_regular, read_regular
from moec.model_path import kind_of_model
from moec.parallel.store import manifest_of
from moec.runtime.artifact import artifact as artifacts
from moec.runtime.artifact.signature import check_signature, sign
from moec.runtime.call import executor
from tests.attack.gguf_files import draft, number
from tests.attack.refusal import limited
from tests.runtime import toy

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """A pipe without a writer blocks for ever."""

    def wake(*args: object) -> None:
        raise TimeoutError("it blocks")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listens(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(before)


def links_to(target: str) -> Change:
    return lambda path: path.symlink_to(target.format(path=path))


ODD: dict[str, Change] = {
    "pipe": pipe,
    "socket": listens,
    "folder": Path.mkdir,
    "device": links_to("/dev/zero"),
    "itself": links_to("{path}"),
    "outside": links_to("../outside"),
}


def checkpoint(folder: Path) -> Callable[[], object]:
    shutil.copytree(CHECKPOINT, folder)
    return lambda: kind_of_model(str(folder))


def shards(folder: Path) -> Callable[[], object]:
    opens = checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    text = '{"weight_map": {"a": "a.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    return opens


def adapter(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return lambda: read_adapter(folder)


def split(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    first = draft()
    first.fields += [(b"split.count", *number(2)), (b"split.no", *number(0))]
    (folder / "m-00001-of-00002.gguf").write_bytes(first.encode())
    return lambda: read_header(folder / "m-00001-of-00002.gguf")


def artifact(folder: Path) -> Callable[[], object]:
    artifacts.write(toy.package(), folder, folder=True, graphs={"main": ""})
    return lambda: executor.load(folder)


def ranks(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    return lambda: manifest_of(folder)


def keys(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    return lambda: sign(folder / "x.moec", b"", folder / "key.pem")


def public(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    return lambda: check_signature(folder / "x.moec", b"", folder / "key.pub")


ROLES = {
    **dict.fromkeys(("config.json", "tokenizer.json", "chat_template.jinja"), checkpoint),
    **dict.fromkeys(("generation_config.json", "model.safetensors"), checkpoint),
    **dict.fromkeys(("model.safetensors.index.json", "a.safetensors"), shards),
    "adapter_config.json": adapter,
    "m-00002-of-00002.gguf": split,
    **dict.fromkeys(("manifest.json", "graphs/main.moec", "weights/00003.bin"), artifact),
    "ranks.json": ranks,
    "key.pem": keys,
    "key.pub": public,
}
ALLOWED = {
    ("chat_template.jinja", "folder"),  # not read
    ("key.pem", "outside"),
    ("key.pub", "outside"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ROLES)
def test_what_is_no_file_of_its_folder(name: str, odd: str, tmp_path: Path) -> None:
    if (name, odd) in ALLOWED:
        return
    folder = tmp_path / "x"
    opens = ROLES[name](folder)
    path = folder / name
    if path.is_file():
        path.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_bytes(b"{}")
    ODD[odd](path)
    with pytest.raises(MoecError) as raised:
        opens()
    message = str(raised.value)
    assert "\n" not in message
    assert path.name in message or path.stem in message


def test_a_signature(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from tests.runtime.artifact.test_signature import public_path, write_pair

    key = write_pair(tmp_path, "key")
    for name, odd in ODD.items():
        if name != "outside":
            path = tmp_path / f"{name}.moec.sig"
            odd(path)
            with pytest.raises(MoecError, match=path.name):
                check_signature(path.with_suffix(""), b"", public_path(key))


def test_a_file_and_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with open_regular(tmp_path / "x") as file:
        assert file.read() == b"abc"
    with limited(1 << 26):  # bytes: what is read is counted, not what might be
        assert read_regular(tmp_path / "x", 3) == read_regular(tmp_path / "x") == b"abc"
    with pytest.raises(OSError, match="large"):
        read_regular(tmp_path / "x", 2)


def test_too_few_files(tmp_path: Path) -> None:
    """`ulimit -n`: what cannot be opened is one sentence, and a mistake of the user."""
    resource = pytest.importorskip("resource")
    load = artifact(tmp_path / "x")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    present = len(os.listdir("/proc/self/fd"))
    ends = []
    for more in range(0, 16, 2):
        resource.setrlimit(resource.RLIMIT_NOFILE, (present + more, before[1]))
        try:
            load()
        except Exception as error:
            ends.append(verdict(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert ends
    words = "too many files are open; raise the limit (ulimit -n)"
    assert all(code == 1 and words in message for code, message in ends)
    load()
    without_name = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert verdict(without_name) == (1, f"error: this process: {words}")
