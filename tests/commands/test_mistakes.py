"""Mistakes of users, files or environments: exit code 1 or 2, one sentence, never 70."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.runtime.artifact import artifact
from tests.command_line import invoke
from tests.runtime import toy
from tests.runtime.damaged import edit_manifest, unpacked


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speaker") / "speaker.moec"
    files = toy.tokenizer_files()
    artifact.write(toy.language_model(), path, graphs={"main": toy.GRAPH}, files=files)
    return path


def shell_moec(*words: object, shell: str = "", **environment: str) -> tuple[int, str, str]:
    """The exit code, and the texts of stdout and stderr."""
    command = [sys.executable, "-m", "moec", *map(os.fsencode, map(str, words))]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
    return done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")


def refused(*words: object, code: int = 1, **environment: str) -> str:
    """The one sentence that refuses a command."""
    done = invoke(*words, env=environment)
    assert done.exit_code == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_of_a_prompt(speaker: Path) -> None:
    prompt = ("run", speaker, "--prompt", "b c")
    assert "'--seed': -1 is not in the range x>=0" in refused(*prompt, "--seed", "-1", code=2)
    words = refused("run", speaker, "--prompt", "b \udcff", code=2)
    assert words == "error: the prompt is not UTF-8 at character 2: convert it first"


def test_of_names(speaker: Path, tmp_path: Path) -> None:
    words = refused("run", "a\x1b[31m\x07b.moec", "--prompt", "x")
    assert words == r"error: a\x1b[31m\x07b.moec: there is no such file"
    assert "the argument 'a\\x00b' contains a zero byte" in refused("verify", "a\0b", code=2)
    words = refused("verify", "x" * 5000)
    assert words.endswith("x: the name is too long")
    assert len(words) < 300
    near = speaker.with_name("speeker.moec")
    assert refused("verify", near).endswith(f"no such file; did you mean '{speaker}'?")
    (loop := tmp_path / "loop.moec").symlink_to(loop)
    assert refused("verify", loop).endswith("loop.moec: there is no such file")
    (tmp_path / "ünï 模型.moec").symlink_to(speaker)
    path = tmp_path / "none" / ".." / "ünï 模型.moec"
    (tmp_path / "none").mkdir()
    done = invoke("run", str(path), "--prompt", "b c", "-q")
    assert (done.exit_code, done.stdout) == (0, " d e f g\n")


def test_of_prompts(speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"b\xff")
    for name, words in (
        ("none.txt", "there is no such file or folder"),
        (".", "it is a folder, not a file"),
        ("empty.txt", "has no prompt: write one per line"),
        ("latin.txt", "is not UTF-8 at byte 1: convert it first"),
    ):
        assert words in refused("run", speaker, "--prompts", tmp_path / name)
    monkeypatch.setattr("moec.commands.execution.text.MOST_BYTES", 1_000_000)
    words = refused("run", speaker, "--prompts", "/dev/zero")
    assert words == "error: --prompts /dev/zero: it is a device or a pipe, not a file"
    done = invoke("run", str(speaker), "--prompt", "-", input=b"b" * 1_000_001)
    assert done.stderr == "error: stdin holds more than 1 MB: split it\n"
    done = invoke("run", str(speaker), "--prompts", "-", input=b"\xff")
    assert done.stderr == "error: stdin is not UTF-8 at byte 0: convert it first\n"
    assert "is not in the range 1<=x<=4096" in refused(
        "run", speaker, "--prompt", "b", "--threads", 10**11, code=2
    )


def test_of_the_cache() -> None:
    assert "MOEC_CACHE is /dev/null, which is not a folder" in refused(
        "cache", MOEC_CACHE="/dev/null"
    )
    words = refused("list", "pases", code=2)
    assert "'pases' is not one of passes, targets, models, formats; did you mean 'passes'?" in words


def test_of_a_folder_that_is_no_output(tmp_path: Path) -> None:
    """Said before the minutes of work."""
    (tmp_path / "thesis.txt").touch()
    model = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
    words = refused("compile", model, "-o", tmp_path, "--force")
    assert words.endswith(
        "is not an artifact, and --force replaces artifacts only: choose another name"
    )
    words = refused("compile", model, "--dry-run", "--dump-ir", tmp_path / "thesis.txt" / "x")
    assert words.endswith("thesis.txt is not a folder")


def test_a_plan_is_not_what_the_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact for one process was written where ranks were asked for."""
    monkeypatch.setattr("moec.commands.compile.fetch", lambda *_, **options: True)
    model = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
    words = refused("compile", model, "-o", tmp_path / "ranks", "--plan", "none.json")
    assert words == "error: none.json does not exist"


def test_of_the_environment(speaker: Path) -> None:
    prompt = ("run", speaker, "--prompt", "b c", "--quiet")
    for value in ("abc", "0", "-2"):
        words = refused(*prompt, code=2, TVM_NUM_THREADS=value)
        assert f"the environment variable TVM_NUM_THREADS is '{value}': give a whole" in words
    assert shell_moec(*prompt, TVM_NUM_THREADS="") == (0, " d e f g\n", "")


def test_closed_streams(speaker: Path) -> None:
    prompt = ("run", speaker, "--prompt", "b c", "--quiet")
    assert shell_moec(*prompt, shell=">&-") == (0, "", "")
    assert shell_moec(*prompt, shell="2>&-") == (0, " d e f g\n", "")
    assert shell_moec("verify", speaker, shell="<&- >&- 2>&-") == (0, "", "")


def test_a_name_that_no_terminal_can_show(speaker: Path, tmp_path: Path) -> None:
    path = shutil.copy(speaker, os.fsencode(tmp_path) + b"/\xff.moec")
    code, out, _ = shell_moec("verify", os.fsdecode(path))
    assert code == 0
    assert "\\udcff.moec is intact" in out


def test_of_a_picture(speaker: Path, tmp_path: Path) -> None:
    path = tmp_path / "none" / "x.dot"
    words = refused("inspect", speaker, "--graph", path)
    folder = f"the folder {path.parent} does not exist: create it first"
    assert words == f"error: --graph {path}: {folder}"
    words = refused("inspect", speaker, "--graph", tmp_path, code=2)
    assert "the name must end in .dot" in words


def test_of_a_forged_artifact(speaker: Path, tmp_path: Path) -> None:
    """Its digests are right."""
    path = Path(shutil.copy(speaker, tmp_path / "forged.moec"))
    folder = unpacked(path)
    edit_manifest(folder, lambda text: text["arrays"]["table"].update(shape=[0, 10**30]))
    assert "manifest.json is malformed" in refused("verify", folder)


def test_of_a_part_without_a_name(tmp_path: Path) -> None:
    """zipfile of Python 3.11 looks at the last letter of a name that has none."""
    path = tmp_path / "nameless.moec"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"")
    assert refused("verify", path).endswith("'' is not a valid name of a part")


def test_of_a_tensor_file(speaker: Path, tmp_path: Path) -> None:
    np.savez(path := tmp_path / "x.npz", input_ids=np.zeros((1, 2), np.int64))
    content = path.read_bytes()
    at = content.index(b"PK\1\2") + 10  # the method, in the directory
    path.write_bytes(content[:at] + b"\x63" + content[at + 1 :])
    words = refused("run", speaker, "--input", path)
    assert words.endswith("'input_ids' is encrypted, or compressed by another method")


@pytest.mark.skipif(sys.platform != "linux", reason="a full disk is made by mount")
def test_a_full_folder_for_temporary_files(tmp_path: Path) -> None:
    """LLVM ended the process: `LLVM ERROR: IO failure on output stream`."""
    program = (
        "import torch, moec\n"
        "try: moec.compile(torch.nn.Linear(8, 8).eval(), (torch.zeros(3, 8),), verify=False)\n"
        "except moec.MoecError as error: print(error)\n"
    )
    mount = f"mount -t tmpfs -o size=32k tmpfs {tmp_path} && TMPDIR={tmp_path} "
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + '"$@"', "sh", sys.executable, "-c", program],
        capture_output=True, text=True, env={**os.environ, "MOEC_CACHE": "off"},
    )  # fmt: skip
    if done.returncode and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip("this machine lets nobody mount")
    assert done.stdout.startswith(f"{tmp_path}, for temporary files, has "), done.stderr
    assert "set TMPDIR to a folder on another disk" in done.stdout


TINY = str(Path(__file__).parents[2] / "examples/tiny_moe/checkpoint")
DRY = ["compile", TINY, "--dry-run"]
TYPOS = (
    (["compile", "no-model", "-o", "x.moec"], "no-model does not exist: give the folder"),
    ([*DRY, "--adapter", "none"], "the adapter none is no folder"),
    ([*DRY, "--adapter", TINY], "checkpoint is no adapter of PEFT: it has no adapter_config.json"),
    (["compile", "no/model", "-o", "x.moec"], "no/model does not exist here, and the hub's cache"),
    (
        ["compile", TINY, "-o", "x.moec", "--revision", "v1"],
        "no id of the hub, and only these have",
    ),
    (["compile", ".", "-o", "x.moec"], ". is not a checkpoint: it has no config.json"),
    (["compile", "none.py", "--dry-run"], "name the function that returns the model"),
    (["compile", "none.py:f", "--dry-run"], "none.py does not exist"),
    (["compile", "no/model", "-o", "none/x.moec"], "the folder none does not exist"),
    (["compile", "x" * 5000, "-o", "x.moec"], "cannot be the path of a model"),
    (["export", "no/model", "-o", "x.onnx"], "no/model does not exist"),
    (["inspect", "no/model"], "no/model does not exist"),
    (["bisect", "no/model"], "no/model does not exist"),
    (["bench", "no/model"], "no/model does not exist"),
    ([*DRY, "--passes", "+prune-expert(keep=1)"], "+name or -name; did you mean 'prune-experts'?"),
    ([*DRY, "--passes", "+specialise(task=1"], "a parenthesis is unbalanced"),
    ([*DRY, "--passes", "fuse-gate"], "write +fuse-gate or -fuse-gate"),
    ([*DRY, "--quant", "int7"], "'int7' is not a format; write int8, int6, int5"),
    ([*DRY, "--calib", "none.npz"], "--calib none.npz: there is no such file"),
    ([*DRY, "--budget", "kl<0.1"], "--budget kl<0.1: write METRIC<=NUMBER"),
    ([*DRY, "--stop-after", "fuse-gat"], "no such pass; did you mean 'fuse-gate'?"),
    ([*DRY, "--shapes", "x"], "--shapes 'x' is not INPUT=SIZES"),
    ([*DRY, "--target", "cpuu"], "cpuu"),
    (["compile", TINY, "-o", "ranks", "--plan", "none.json"], "none.json does not exist"),
    (["export", TINY, "-o", "x.onnx", "--opset", "3"], "3 is not in the range 18<=x<=25"),
    (["export", TINY, "-o", "x.onnx", "--passes", "+magic"], "+magic: write +name or -name"),
    (["inspect", TINY, "--passes", "-fuse-gatee"], "did you mean 'fuse-gate'?"),
    (["bisect", TINY, "--passes", "-fuse-gatee"], "did you mean 'fuse-gate'?"),
    (["bench", TINY, "--quant", "int7"], "'int7' is not a format"),
    (["bench", TINY, "--baseline", "egaer"], "no baseline has this name; did you mean 'eager'?"),
    (["bench", TINY, "--baseline", "llama.cpp"], "give one with --file FILE.gguf"),
    (["plan", "mixtral", "--cluster", "none"], "none"),
)


def test_a_typo_costs_no_import_of_torch() -> None:
    """One process runs all cases: each import of torch takes seconds."""
    program = (
        "import sys, json\n"
        "from click.testing import CliRunner\n"
        "from moec.__main__ import cli\n"
        "said = [CliRunner().invoke(cli, words).stderr for words in json.load(sys.stdin)]\n"
        "print(json.dumps([said, sorted({'torch', 'tvm'} & sys.modules.keys())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps([words for words, _ in TYPOS]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report, heavy = json.loads(done.stdout)
    assert heavy == []
    for line, (_, words) in zip(report, TYPOS, strict=True):
        assert line.startswith("error: ")
        assert words in line


def test_the_names_of_passes_are_those_of_the_pipeline() -> None:
    """A name in passes/core/names.py is all that the command line reads before it imports torch."""
    from moec import pipeline
    from moec.passes.core import names

    expected = [*(p.name for p in pipeline.all_passes()), *(str(k.name) for k in pipeline.OPT_IN)]
    assert list(names.NAMES) == expected
    assert list(names.ON_REQUEST) == [pass_.name for _, pass_ in pipeline.ON_REQUEST]


def test_what_was_probably_meant() -> None:
    with pytest.raises(moec.MoecError, match="5 is not the path of an artifact"):
        moec.load(5)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'compil'; did you mean 'compile'"):
        getattr(moec, "compil")  # noqa: B009


def test_what_draws_is_looked_for_before_minutes_of_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = refused("bench", "no/model", "--plot", tmp_path / "x.svg")
    assert "needs matplotlib, which is not installed: pip install 'moec[bench]'" in words


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="it needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pipe_among_the_files_of_a_checkpoint(tiny_moe: Path, tmp_path: Path, name: str) -> None:
    """Reading it would wait for ever."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_moe, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is not a regular file" in refused("compile", folder, "-o", tmp_path / "x.moec")


READ = {
    "prompts": "run {speaker} --prompts {pipe}",
    "resume": "run {speaker} --prompts {lines} --resume {pipe}",
    "input": "run {speaker} -i {pipe}.npz",
    "tensors": "run {speaker} -i {pipe}.safetensors",
    "text": "eval {speaker} --text {pipe}",
    "tasks": "eval {speaker} --tasks {pipe}.jsonl",
    "calib": "compile {lines} --dry-run --quant int4 --calib {pipe}.txt",
    "choices": "compile {checkpoint} --dry-run --choices {pipe}.yaml",
    "groups": "plan mixtral-8x7b --cluster h100-8 --groups {pipe}.yaml",
    "routing": "plan mixtral-8x7b --cluster h100-8 --trace {pipe}.npz",
    "compare": "plan mixtral-8x7b --cluster h100-8 --compare {pipe}.json",
    "model": "plan {pipe}.yaml --cluster h100-8",
    "plan": "compile {lines} -o {lines}.moec --plan {pipe}.json",
    "key": "sign {speaker} --key {pipe}",
    "signature": "run {speaker} --prompt a --signed-by {pipe}",
    "routed": "routing {pipe}.jsonl",
    "trace": "profile {speaker} -i {pipe}.npz",
    "artifact": "run {pipe}.moec --prompt a",
    "draft": "run {speaker} --prompt a --draft {pipe}.moec",
}
"""Each file that a command reads."""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="it needs named pipes")
@pytest.mark.parametrize("words", READ.values(), ids=READ)
def test_a_pipe_is_not_waited_for(speaker: Path, tmp_path: Path, words: str) -> None:
    """Opening one that nobody writes to waits for ever."""
    (tmp_path / "lines").write_text("a\n")
    for ending in ("", *(".npz .safetensors .jsonl .txt .yaml .json .moec".split())):
        os.mkfifo(tmp_path / f"pipe{ending}")
    names = {"speaker": speaker, "pipe": tmp_path / "pipe", "lines": tmp_path / "lines"}
    names["checkpoint"] = Path("examples/tiny_moe/checkpoint").absolute()

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        code = 2 if words == READ["model"] else 1
        assert str(tmp_path / "pipe") in refused(*words.format(**names).split(), code=code)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
