"""A chat in a terminal: lines with history, answers that Ctrl-C stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from rich.console import Console

from moec.commands.chatting.answer import Chat
from moec.commands.chatting.commands import perform
from moec.errors import MoecError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import printable


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
        raise UsageError(f"{path}: {reason(error)}; --no-history does without it") from error
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
