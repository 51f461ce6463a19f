"""`moec chat`: answers, commands, keys and lines, in a terminal and without one."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

import moec
from moec.errors import ArtifactError, UsageError
from moec.runtime.artifact import artifact
from moec.runtime.text.chats.chat import ChatTemplate
from moec.runtime.text.engine import Engine
from moec.runtime.text.request import Request
from moec.runtime.text.sampling import Sampling
from moec.serving.chat.answer import Chat
from moec.serving.chat.terminal import converse, history_file, interruptible, new_session
from tests.command_line import invoke

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def "
ROOM, MOST = 128, 9


@pytest.fixture(scope="module")
def path(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_moe with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    compiled_tiny_moe.save(folder / "plain.moec")
    plain = artifact.read(folder / "plain.moec")
    files = {**plain.files, "tokenizer/chat_template.jinja": TEMPLATE.encode()}
    artifact.write(plain.package, folder / "chat.moec", graphs=plain.graphs, files=files)
    return folder / "chat.moec"


@pytest.fixture(scope="module")
def model(path: Path) -> moec.LoadedModel:
    return moec.load(path)


@pytest.fixture
def chat(model: moec.LoadedModel) -> Iterator[Chat]:
    engine = Engine(model.executor, 1, ROOM)
    yield Chat(engine, model.tokenizer, Request(MOST, stop=model.tokenizer.stop))
    assert not engine.busy


def type_lines(chat: Chat, *lines: str, history: Path | None = None) -> str:
    """What the terminal shows after some lines (or keys) and Ctrl-D, without the prompts."""
    shown = io.StringIO()
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("".join(line if line == "\x03" else f"{line}\r" for line in lines) + "\x04")
        converse(chat, new_session(history), Console(file=shown, width=80))
    return shown.getvalue()


def answers(model: moec.LoadedModel, *questions: str, most: int = MOST) -> list[dict[str, str]]:
    """The messages of a chat, by `generate`."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = ChatTemplate(TEMPLATE).render(messages)
        text: str = model.generate(prompt, max_new_tokens=most)
        messages.append({"role": "assistant", "content": text.removeprefix(prompt)})
    return messages


def test_a_chat(chat: Chat, model: moec.LoadedModel) -> None:
    shown = type_lines(chat, "open a file", "", "read lines ")
    assert chat.messages == answers(model, "open a file", "read lines")
    assert [m["content"] for m in chat.messages if m["content"] not in shown] == [
        "open a file",
        "read lines",
    ]
    prompt = model.tokenizer.chat(chat.messages[:1])
    pattern = rf"9 tokens at [\d.]+/s, the first after \d\.\d\d s, {len(prompt)} of "
    assert re.search(
        pattern + rf"{len(prompt)} prompt tokens processed; cut by --max-new-tokens", shown
    )


def test_ctrl_c_at_the_prompt_drops_the_line(chat: Chat, model: moec.LoadedModel) -> None:
    type_lines(chat, "op\x03open a file", "\x03")
    assert chat.messages == answers(model, "open a file")


def test_an_answer_that_is_stopped_stays(chat: Chat, model: moec.LoadedModel) -> None:
    chat.add("user", "open a file")
    pieces: list[str] = []
    answer = chat.answer(pieces.append, lambda: len(pieces) == 4)
    assert (answer.tokens, answer.end) == (4, "; stopped")
    assert chat.messages == answers(model, "open a file", most=4)
    assert "".join(pieces) == chat.messages[1]["content"]
    chat.messages.pop()
    assert chat.answer(pieces.append, lambda: True).tokens == 0
    assert chat.messages[1] == {"role": "assistant", "content": ""}


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Python's handler of Ctrl-C: launchers of ranks leave theirs in the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_signals")
def test_only_the_second_ctrl_c_interrupts() -> None:
    with interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), 2)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), 2)


def test_strings_end_an_answer(chat: Chat, model: moec.LoadedModel) -> None:
    (_, free) = answers(model, "open a file")
    stop = free["content"][3:5]
    chat.stops = (stop,)
    shown = type_lines(chat, "open a file")
    assert chat.messages[1]["content"] == free["content"].partition(stop)[0]
    assert "--max-new-tokens" not in shown


def test_system_retry_and_clear(chat: Chat, model: moec.LoadedModel) -> None:
    """A new answer has other random numbers, and a chat with the same seed repeats all of them."""
    chat.request = replace(chat.request, sampling=Sampling(1.5, seed=3))
    lines = ("/system be brief", "open a file", "/retry")
    type_lines(chat, lines[0], lines[1])
    first = list(chat.messages)
    assert first[0] == {"role": "system", "content": "be brief"}
    type_lines(chat, lines[2])
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[:2] == first[:2]
    assert chat.messages[2] != first[2]
    again = replace(chat, messages=[], answers=0)
    type_lines(again, *lines)
    assert again.messages == chat.messages
    assert "with the same system message" in type_lines(chat, "/clear")
    assert chat.messages == first[:1]
    assert "there is no message to answer yet" in type_lines(chat, "/retry")
    type_lines(chat, "/system", "/clear")
    assert chat.messages == []


def test_how_tokens_are_drawn_is_set(chat: Chat) -> None:
    shown = type_lines(chat, "/set temperature 0.8", "/set top_k 5", "/set top_p 0.9", "/set")
    assert "temperature is 0.8 from the next answer on" in shown
    assert "top_k               5" in shown
    sampling = chat.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 5, 0.9)
    for line, words in (
        ("/set heat 1", "/set heat: give one of temperature, top_p, top_k, seed, min_p"),
        ("/set seed x", "/set seed: 'x' is no number: write /set temperature 0.7"),
        ("/set temperature -1", "temperature is -1.0; it must be 0 or more"),
        ("/set temperature 0", "temperature 0 does not sample, and these limit sampling"),
    ):
        assert words in " ".join(type_lines(chat, line).split())
    assert chat.request.sampling == sampling


def test_save_and_load(chat: Chat, model: moec.LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    shown = type_lines(chat, "open a file", f"/save {file}", f"/save {file}")
    assert f"2 messages in {file}" in shown
    assert f"/save {file}: it exists already" in shown
    assert json.loads(file.read_text()) == answers(model, "open a file")
    other = replace(chat, messages=[])
    assert f"2 messages from {file}" in type_lines(other, f"/load {file}", "read lines")
    assert other.messages == answers(model, "open a file", "read lines")
    file.write_text(json.dumps(chat.messages[:1]))
    type_lines(other, f"/load {file}")
    assert other.messages == chat.messages  # the last message was not answered yet


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/hepl", "there is no command /hepl; did you mean '/help'?"),
        ("/etc/hosts", "there is no command /etc/hosts; the commands are /help, /system, /set,"),
        ("/save", "/save needs the name of a file: /save chat.json"),
        ("\x1b[200~/save \0\x1b[201~", "embedded null byte: choose another file"),
        ("/save ~nobody~/x", "/save ~nobody~/x: there is no such file or folder"),
        ("/save /none/x.json", "/save /none/x.json: there is no such file or folder"),
        ("/load none.json", "/load none.json: there is no such file or folder"),
        ("/load FILE", "it is no JSON (Expecting value"),
        ("/load OBJECT", "it is no list of messages"),
        ("/load ROLE", "message 0 is {'role': 'bot', 'content': ''}; its role is one of"),
        ("/load /dev/zero", "/load /dev/zero: it is a device or a pipe, not a file"),
    ],
)
def test_commands_that_are_refused(chat: Chat, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "OBJECT").write_text("{}")
    (tmp_path / "ROLE").write_text('[{"role": "bot", "content": ""}]')
    for name in ("FILE", "OBJECT", "ROLE"):
        line = line.replace(name, str(tmp_path / name))
    chat.add("system", "stays")
    assert words in type_lines(chat, line)
    assert chat.messages == [{"role": "system", "content": "stays"}]


def test_help_and_exit(chat: Chat) -> None:
    shown = type_lines(chat, "/help", "/exit", "not read")
    assert "/save FILE   write the messages as JSON, into a new file\n" in shown
    assert chat.messages == []


def test_a_chat_that_outgrows_the_context(chat: Chat, model: moec.LoadedModel) -> None:
    long = "x " * ROOM
    chat.request = replace(chat.request, most=ROOM)
    shown = type_lines(chat, "open a file", "read lines", "/clear", long, "open a file")
    assert shown.count("the context is full: /clear begins a new chat") == 2
    assert f"and a text has at most {ROOM}: /clear begins a new chat" in shown
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_an_error_of_the_model_does_not_end_the_chat(
    chat: Chat, model: moec.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read of an expert that fails."""

    def fail(*arguments: Any) -> Any:
        raise ArtifactError("the disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(model.executor, "decode", fail)
        assert "the disk failed\n" in type_lines(chat, "open a file")
    assert chat.messages == []
    type_lines(chat, "open a file")
    assert chat.messages == answers(model, "open a file")


def test_models_cannot_control_the_terminal(chat: Chat) -> None:
    tokenizer = replace(chat.tokenizer)
    object.__setattr__(
        tokenizer, "decoder", lambda prompt, special: lambda token: "\x1b]0;x\x07[red]:+1:"
    )
    shown = type_lines(replace(chat, tokenizer=tokenizer, request=Request(1)), "a")
    assert "\\x1b]0;x\\x07[red]:+1:\n" in shown
    assert "\x1b" not in shown


def test_the_history_is_private(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = history_file()
    type_lines(chat, "/help", history=file)
    assert file == tmp_path / "state" / "moec" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "+/help\n" in file.read_text()
    file.chmod(0o644)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    type_lines(chat, "\x1b[A", history=file)  # the arrow brings /help back
    assert file.read_text().count("+/help\n") == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="--no-history does without it"):
        history_file()


def run(path: Path, *words: object, stdin: bytes) -> Any:
    command = ["chat", str(path), *map(str, words)]
    return invoke(*command, input=stdin)


def test_lines_without_a_terminal(path: Path, model: moec.LoadedModel) -> None:
    expected = answers(model, "/help", "read lines")
    done = run(path, "--max-new-tokens", MOST, stdin=b"/help\n\nread lines")
    assert done.stdout == "".join(f"{m['content']}\n" for m in expected[1::2])
    done = run(path, "--max-new-tokens", MOST, "--json", stdin=b"/help\nread lines\n")
    assert json.loads(done.stdout) == {"artifact": str(path), "messages": expected}
    done = run(path, "--max-new-tokens", 1, "--system", "be brief", "--json", stdin=b"")
    assert json.loads(done.stdout)["messages"] == [{"role": "system", "content": "be brief"}]


@pytest.mark.parametrize(
    ("code", "words", "stdin", "message"),
    [
        (1, ("--context", 8), b"open a file", "the chat has"),
        (2, ("--top-p", 0.5), b"", "temperature 0 does not sample"),
        (2, ("--stop", ""), b"x", "each must be a string"),
        (2, ("--context", 100_000), b"", "the model takes at most"),
        (1, (), b"\xff\n", "stdin is not UTF-8 at byte 0"),
    ],
)
def test_mistakes(
    path: Path, code: int, words: tuple[object, ...], stdin: bytes, message: str
) -> None:
    done = run(path, *words, stdin=stdin)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr


def test_models_that_cannot_chat(path: Path, tmp_path: Path) -> None:
    done = run(path.with_name("plain.moec"), stdin=b"x")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the model has no chat template (chat_template.jinja")
    (tmp_path / "ranks.json").touch()
    assert "the ranks of a plan: moec chat is for one process" in run(tmp_path, stdin=b"").stderr


SLOW = """
import runpy, time
from moec.runtime.call.executor import Executor
decode = Executor.decode
def slow(*arguments):
    time.sleep(0.02)
    return decode(*arguments)
Executor.decode = slow
runpy.run_module("moec", run_name="__main__")
"""


class Terminal:
    """A program in a pseudo-terminal, and what it has shown."""

    def __init__(self, program: str, *words: object, state: Path) -> None:
        self.shown, (self.end, far) = "", pty.openpty()
        environment = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "TERM": "xterm"}
        command = [sys.executable, "-c", program, *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, env=os.environ | environment,
            start_new_session=True, preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )  # fmt: skip
        os.close(far)

    def wait(self, pattern: str, keys: str = "") -> str:
        """Press keys once a pattern was shown; returns what was shown up to its end."""
        start = time.monotonic()
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() - start < 60, self.shown
            if select.select([self.end], [], [], 0.1)[0]:
                self.shown += os.read(self.end, 1 << 16).decode(errors="replace")
                if "\x1b[6n" in self.shown:  # where is the cursor?
                    self.shown = self.shown.replace("\x1b[6n", "")
                    os.write(self.end, b"\x1b[1;1R")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        os.write(self.end, keys.encode())
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


def test_ctrl_c_in_a_terminal(path: Path, tmp_path: Path) -> None:
    """It stops an answer, and not the chat; at the prompt it drops the line."""
    terminal = Terminal(SLOW, "chat", path, "--max-new-tokens", 110, state=tmp_path)
    try:
        assert "chat.moec" in terminal.wait("/help lists the commands.*> ", "open a file\r")
        terminal.wait(r"\x1b\[\?2004l\w{4}", "\x03")  # the prompt has ended, and an answer comes
        terminal.wait(r"\d+ tokens at .* prompt tokens processed; stopped.*> ", "lost\x03")
        terminal.wait("> ", f"/save {tmp_path}/chat.json\r")
        terminal.wait("2 messages in .*> ", "\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
    question, answer = json.loads((tmp_path / "chat.json").read_text())
    assert question == {"role": "user", "content": "open a file"}
    (_, full) = answers(moec.load(path), "open a file", most=110)
    assert answer["content"]
    assert full["content"].startswith(answer["content"])
    assert len(answer["content"]) < len(full["content"])


def test_a_terminal_without_prompt_toolkit(path: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['prompt_toolkit'] = None" + SLOW
    terminal = Terminal(program, "chat", path, state=tmp_path)
    try:
        shown = terminal.wait("moec.chat.'")
    finally:
        terminal.close()
    assert shown == (
        "error: a chat in a terminal needs prompt_toolkit, which is not installed: "
        "pip install 'moec[chat]'"
    )
