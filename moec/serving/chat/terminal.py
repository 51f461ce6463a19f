"""A chat in a terminal: lines with history, answers that Ctrl-C stops."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from rich.console import Console

from moec.commands.execution.text import read_limited
from moec.errors import MoecError, SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import printable
from moec.files.regular_file import open_regular
from moec.report.units import counted
from moec.runtime.text.chats.chat import check_messages
from moec.serving.chat.answer import Chat
from moec.spelling import did_you_mean

# The commands inside a chat: /help, /save FILE and so on. Each changes the chat, and returns what
# to show.


def perform(chat: Chat, line: str) -> str:
    """Perform a command. Raises UsageError for one that cannot be performed, InputError for
    messages that are malformed, and EOFError where the chat ends."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        names = f"; the commands are {', '.join(COMMANDS)}; a message has a space before its /"
        raise UsageError(f"there is no command {name}{did_you_mean(name, COMMANDS) or names}")
    form, _, function = COMMANDS[name]
    if form.endswith("FILE") and not argument.strip():
        raise UsageError(f"{name} needs the name of a file: {name} chat.json")
    try:
        return function(chat, argument.strip())
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise UsageError(f"{line.strip()}: {why}: choose another file") from error


def _help(chat: Chat, argument: str) -> str:
    lines = [f"{form:<13}{meaning}" for form, meaning, _ in COMMANDS.values()]
    return "\n".join([*lines, "Ctrl-C       stop an answer", "Ctrl-D       end the chat"])


def _system(chat: Chat, text: str) -> str:
    others = [message for message in chat.messages if message["role"] != "system"]
    chat.messages[:] = [{"role": "system", "content": text}, *others] if text else others
    return "the next answer follows it" if text else "there is no system message now"


def _retry(chat: Chat, argument: str) -> str:
    while chat.messages and chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    if not chat.open:
        raise UsageError("/retry: there is no message to answer yet: write one")
    return ""


def _set(chat: Chat, argument: str) -> str:
    name, _, text = argument.partition(" ")
    sampling = chat.request.sampling
    values = {n: value for n, value in vars(sampling).items() if n != "logit_bias"}
    if not argument:
        return "\n".join(f"{n:<20}{value}" for n, value in values.items())
    if name not in values:
        raise UsageError(f"/set {name}: give one of {', '.join(values)}, and a number")
    try:
        value: Any = int(text) if name in ("top_k", "seed") else float(text)
    except ValueError:
        raise UsageError(
            f"/set {name}: {text!r} is no number: write /set temperature 0.7"
        ) from None
    sampling = replace(sampling, **{name: value})
    chat.request = replace(chat.request, sampling=sampling)
    return f"{name} is {value} from the next answer on"


def _clear(chat: Chat, argument: str) -> str:
    chat.messages[:] = [message for message in chat.messages if message["role"] == "system"]
    return "a new chat, with the same system message" if chat.messages else "a new chat"


def _save(chat: Chat, name: str) -> str:
    with open(os.path.expanduser(name), "x", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(chat.messages, file, indent=1, ensure_ascii=False)
    return f"{counted(len(chat.messages), 'message')} in {name}"


def _load(chat: Chat, name: str) -> str:
    with open_regular(Path(name).expanduser()) as file:
        content = read_limited(name, file)
    try:
        messages = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"/load {name}: it is no JSON ({error}): use a file of /save") from error
    if not isinstance(messages, list):
        raise UsageError(f"/load {name}: it is no list of messages: use a file of /save")
    check_messages(messages)
    chat.messages[:] = messages
    return f"{counted(len(messages), 'message')} from {name}"


def _exit(chat: Chat, argument: str) -> Never:
    raise EOFError


COMMANDS = {
    "/help": ("/help", "this list", _help),
    "/system": ("/system TEXT", "replace the system message; without TEXT, remove it", _system),
    "/set": ("/set NAME N", "change how tokens are drawn; without NAME, show it", _set),
    "/retry": ("/retry", "answer the last message again", _retry),
    "/clear": ("/clear", "begin a new chat, with the same system message", _clear),
    "/save": ("/save FILE", "write the messages as JSON, into a new file", _save),
    "/load": ("/load FILE", "continue the messages of a file", _load),
    "/exit": ("/exit", "end the chat", _exit),
}
"""By name: the form, the meaning, the function."""


def history_file() -> Path:
    """The file of the lines of earlier chats, which only its user can read.

    Raises UsageError where it cannot be written.
    """
    path = platformdirs.user_state_path("moec", appauthor=False) / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        raise SetupError(f"{path}: {reason(error)}; --no-history does without it") from error
    return path


def new_session(history: Path | None) -> PromptSession[str]:
    """A prompt for lines, with the lines of a file before them."""
    return PromptSession(
        [("ansicyan bold", "> ")],
        history=FileHistory(str(history)) if history else None,
    )


def converse(chat: Chat, session: PromptSession[str], console: Console) -> None:
    """Perform commands and answer messages until the user ends the chat. After an error the
    messages are those before the line."""
    while True:
        try:
            line = session.prompt()
            before = list(chat.messages)
            if line.startswith("/"):
                note(console, perform(chat, line), "dim")
            elif line.strip():
                chat.add("user", line.strip())
            if chat.open:
                _answer(chat, console)
        except KeyboardInterrupt:  # at the prompt
            continue
        except EOFError:
            return
        except MoecError as error:
            chat.messages[:] = before
            note(console, str(error), "yellow")


def _answer(chat: Chat, console: Console) -> None:
    with interruptible() as interrupted:
        answer = chat.answer(lambda piece: note(console, piece, end=""), interrupted)
    note(console, f"\n{answer.line()}\n", "dim")


def note(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Print a text, if there is any; its control characters as escapes."""
    if text:
        console.out(printable(text), style=style, end=end, highlight=False)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C only makes the function return True; the second interrupts."""
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def press(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
