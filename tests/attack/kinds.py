"""The kinds of attack. A case is one or more calls of the command line, as by a user, or the use of
a model in the process.

artifacts   damaged bytes of artifacts: only untouched parts may be accepted
forged      changed manifests and parts, with correct digests
tensors     .npy, .npz and .safetensors, damaged or forged
graphs      texts of graphs in an artifact with correct digests
rebuilt     the same, for an artifact that is recompiled and run
commands    command lines of valid and odd words
unlisted    artifacts with members that no manifest lists: each command refuses them
hub         checkpoints whose files name code, models of the hub, other files, and NaN
folders     damaged folders of quantised checkpoints: each is refused, with little memory
gguf        damaged GGUF files: the same
onnx        damaged ONNX files: the same, but for bytes that may be another model
fields      each field of the JSON files of a checkpoint with values of other types and sizes
splits      GGUF splits and shards of which one is damaged, another, or no file: each is refused
replies     a hub whose answers are damaged or forged: what was announced, or one sentence
requests    of every route of `moec serve`, with extreme values, several at a time
moved       a model in use whose file is moved, replaced, cut or written to
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moec.runtime.artifact import manifest
from tests.attack.in_use import use_case
from tests.attack.mutate import mutated_bytes, mutated_indices, mutated_json, mutated_text
from tests.attack.seeds import REBUILT, graphs, write_rebuilt, write_seeds

Words = list[str]


@dataclass(frozen=True)
class Kind:
    """`seeds` writes the files to damage; `case(folder, draw)` writes the files of a case, and
    returns the words of its commands. `acts` are otherwise forbidden actions that these commands
    may do. `use(folder, draw)` is what the process does instead of commands, and returns its
    faults. With `refuses`, a command that succeeds is a fault. The suite runs `short` cases."""

    case: Callable[[Path, random.Random], list[Words]]
    short: int
    long: int
    acts: frozenset[str] = frozenset()
    seeds: Callable[[Path], None] = write_seeds
    use: Callable[[Path, random.Random], list[str]] | None = None
    refuses: bool = False


def _artifacts(folder: Path, draw: random.Random) -> list[Words]:
    name = draw.choice(("toy", "speaker"))
    path = folder / "case.moec"
    path.write_bytes(mutated_bytes((folder / f"{name}.moec").read_bytes(), draw))
    run = ["run", str(path), *(["--check"] if name == "toy" else ["--prompt", "a b"])]
    return [["verify", str(path)], ["inspect", str(path)], run]


def _forged(folder: Path, draw: random.Random) -> list[Words]:
    name = draw.choice(("toy", "speaker"))
    with zipfile.ZipFile(folder / f"{name}.moec") as archive:
        parts = {member: archive.read(member) for member in archive.namelist()}
    text = json.loads(parts[manifest.NAME])
    if draw.random() < 0.3:
        part = draw.choice(sorted(p for p in parts if not p.startswith(("manifest", "kernels"))))
        parts[part] = mutated_bytes(parts[part], draw)
        text["parts"][part] = _part(parts[part])
    else:
        section = draw.choice(("package", "package", "arrays", "samples", "extra", "parts", "all"))
        if section == "all":
            text = mutated_json(text, draw)
        else:
            text[section] = mutated_json(text[section], draw)
    path = _written(folder / "case.moec", parts, text)
    run = ["run", str(path), *(["--check"] if name == "toy" else ["--prompt", "a b"])]
    return [["verify", str(path)], ["inspect", str(path), "--json"], ["inspect", str(path)], run]


def _graphs(folder: Path, draw: random.Random) -> list[Words]:
    path = _with_graph(folder, "toy", mutated_text(draw.choice(graphs()), draw))
    return [["verify", path], ["inspect", path, "--graph", str(folder / "case.dot")]]


def _rebuilt(folder: Path, draw: random.Random) -> list[Words]:
    mutated = mutated_indices if draw.random() < 0.8 else mutated_text
    path = _with_graph(folder, "rebuilt", mutated(REBUILT, draw))
    return [["run", path, "--rebuild", "--input", str(folder / "rebuilt.npz")]]


def _with_graph(folder: Path, name: str, graph: str) -> str:
    """The path of an artifact with another graph, and its right digest."""
    with zipfile.ZipFile(folder / f"{name}.moec") as archive:
        parts = {member: archive.read(member) for member in archive.namelist()}
    parts["graphs/main.moec"] = content = graph.encode(errors="surrogatepass")
    text = json.loads(parts[manifest.NAME])
    text["parts"]["graphs/main.moec"] = _part(content)
    return str(_written(folder / "case.moec", parts, text))


def _tensors(folder: Path, draw: random.Random) -> list[Words]:
    name = draw.choice(("x.npz", "y.npz", "x.npy", "x.safetensors"))
    content = (folder / name).read_bytes()
    if name == "y.npz" or draw.random() < 0.5:
        content = mutated_bytes(content, draw)
    elif name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        text = json.dumps(mutated_json(json.loads(content[8 : 8 + size]), draw)).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    else:
        start = content.index(b"{'descr'")
        end = content.index(b"}", start) + 1
        header = mutated_text(content[start:end].decode(), draw).encode(errors="surrogatepass")
        content = content[:start] + header[: end - start].ljust(end - start) + content[end:]
    path = (folder / "case").with_suffix(Path(name).suffix)
    path.write_bytes(content)
    return [["run", str(folder / "toy.moec"), "--input", str(path)]]


def _hub(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack.checkpoints import checkpoint_case  # imports torch, which others do without

    return checkpoint_case(folder, draw)


def _folders(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import folders, refusal

    return refusal.case(folders.WRITERS, folder, draw)


def _gguf(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import gguf_files, refusal

    return refusal.case(gguf_files.WRITERS, folder, draw)


def _fields(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import fields

    return fields.case(folder, draw)


def _splits(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import splits

    return splits.case(folder, draw)


def _replies(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import replies

    return replies.case(folder, draw)


def _write_splits(folder: Path) -> None:
    from tests.attack.splits import write_seeds

    write_seeds(folder)


def _onnx(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import onnx_files

    return onnx_files.case(folder, draw)


def _requests(folder: Path, draw: random.Random) -> list[str]:
    from tests.attack import requests

    return requests.case(folder, draw)


def _write_served(folder: Path) -> None:
    from tests.attack import requests

    requests.write_seeds(folder)


def _write_folders(folder: Path) -> None:
    from tests.attack.folders import write_seeds

    write_seeds(folder)


def _no_seeds(folder: Path) -> None:
    """The cases are written from nothing."""


def _none(folder: Path, draw: random.Random) -> list[Words]:
    """No commands: the process uses a model."""
    return []


_NAMES = ("kernels/other.so", "notes.txt", "weights/99999.bin", "tokenizer/x.json", "samples/x")


def _unlisted(folder: Path, draw: random.Random) -> list[Words]:
    path = folder / "case_unlisted"
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    name, content = draw.choice(_NAMES), draw.randbytes(draw.randint(0, 5000))
    if draw.random() < 0.5:
        shutil.unpack_archive(folder / "toy.moec", path, "zip")
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    else:
        shutil.copy(folder / "toy.moec", path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content)
    return [["verify", str(path)], ["run", str(path), "--check"]]


_COMMANDS = {
    "run": (
        *("--input", "--output", "--prompt", "--max-new-tokens", "--temperature", "--top-p"),
        *("--top-k", "--seed", "--check", "--threads", "--nproc", "--timeout", "--json", "-q"),
    ),
    "verify": ("--json", "-q"),
    "inspect": ("--graph", "--json", "-q", "--shapes", "--passes", "-O", "--dtype"),
    "compile": (
        *("-o", "--target", "--passes", "--shapes", "--quant", "--verify", "--stop-after"),
        *("--dry-run", "--plan", "--dtype", "--calib", "--budget", "--force", "-O"),
    ),
    "export": ("-o", "--ep", "--moe", "--opset", "--quant", "--cache", "--verify", "--shapes"),
    "bench": ("--artifact", "--baseline", "--file", "--batch", "--rounds", "--plot", "--threads"),
    "bisect": ("--tolerance", "--seed", "--shapes", "--passes"),
    "plan": ("--cluster", "--trace", "--routing", "--phase", "--tokens", "-o", "--picture"),
    "routing": ("--picture", "-o", "--json", "--force"),
    "list": ("--json",),
    "cache": ("--json",),
    "--version": (),
}


def _commands(folder: Path, draw: random.Random) -> list[Words]:
    files = [str(folder / name) for name in ("toy.moec", "speaker.moec", "x.npz", "x.npy")]
    odd = (
        *(
            "",
            " ",
            "-1",
            "0",
            "1",
            "3",
            "1.5",
            "nan",
            "inf",
            "abc",
            "int8",
            "bf16",
            "b c",
            "\udcff",
        ),
        *("T=3", "x=Tx4", "x=B[5..1]", "+prune-experts", "-fuse-gate", "uniform", "zipf:x", "cpu"),
        *("kl<=0.1", "passes", "9" * 40, "x" * 5000, str(folder), str(folder / "none" / "x.svg")),
        *(str(folder / "out.svg"), str(folder / "out.npz"), "none.py:f", "none.pt2", "/dev/null"),
    )
    name = draw.choice(sorted(_COMMANDS))
    words = [name]
    if draw.random() < 0.8:
        words.append(draw.choice((*files, *odd)))
    for _ in range(draw.randint(0, 4)):
        options = _COMMANDS[name] or ("-h",)
        words.append(draw.choice(options) if draw.random() < 0.9 else _typo(options, draw))
        if draw.random() < 0.7:
            words.append(draw.choice((*files, *odd)))
    return [words]


def _typo(options: tuple[str, ...], draw: random.Random) -> str:
    word = draw.choice(options)
    at = draw.randrange(len(word))
    return word[:at] + draw.choice(string.printable[:95]) + word[at + 1 :]


def _part(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _written(path: Path, parts: Mapping[str, bytes], text: object) -> Path:
    """An artifact of these parts, and a manifest with its right digest where it has one."""
    if isinstance(text, dict):
        body = {key: value for key, value in text.items() if key not in ("moec", "sha256")}
        text = text | {"sha256": manifest.digest_of(text.get("moec", 0), body)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            data = json.dumps(text).encode() if name == manifest.NAME else content
            archive.writestr(name, data)
    return path


_LINKS = frozenset({"os.symlink", "os.chmod"})  # as the files of a case are written
_CHANGES = _LINKS | {"os.truncate"}
_SERVES = _LINKS | {"socket.bind", "socket.connect"}
_CLIENT = frozenset({"subprocess.Popen", "socket.connect"})
_COMPILES = frozenset({"subprocess.Popen"})  # the linker

KINDS: Mapping[str, Kind] = {
    "artifacts": Kind(_artifacts, 60, 10_000),
    "forged": Kind(_forged, 40, 1_000),
    "tensors": Kind(_tensors, 80, 1_000),
    "graphs": Kind(_graphs, 30, 1_000),
    "rebuilt": Kind(_rebuilt, 6, 200, _COMPILES, write_rebuilt),
    "commands": Kind(_commands, 25, 200),
    "unlisted": Kind(_unlisted, 30, 2_000, refuses=True),
    "hub": Kind(_none, 20, 2_000, _LINKS, use=_hub),
    "folders": Kind(_none, 20, 250, seeds=_write_folders, use=_folders),
    "gguf": Kind(_none, 20, 150, seeds=_no_seeds, use=_gguf),
    "onnx": Kind(_none, 20, 400, _LINKS, seeds=_no_seeds, use=_onnx),
    "fields": Kind(_none, 20, 2_000, _LINKS, seeds=_no_seeds, use=_fields),
    "splits": Kind(_none, 20, 2_000, _LINKS, seeds=_write_splits, use=_splits),
    "replies": Kind(_none, 40, 2_000, _SERVES, seeds=_no_seeds, use=_replies),
    "requests": Kind(_none, 60, 5_000, _CLIENT, seeds=_write_served, use=_requests),
    "moved": Kind(_none, 40, 2_000, _CHANGES, use=use_case),
}


def stream(kind: str, seed: int, number: int) -> random.Random:
    """Each case draws from its own stream, so that it can be repeated alone."""
    return random.Random(f"{kind}/{seed}/{number}")
