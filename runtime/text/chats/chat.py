"""Chat templates: messages as the text that a model was trained to answer.

A template is a Jinja program that comes with an artifact, which may be untrusted: it runs in
Jinja's immutable sandbox, in a process of its own with a limit of time and of memory. Its variables
are those of Hugging Face's documentation of chat templates.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moec.errors import ArtifactError, InputError, SetupError
from moec.extras import missing_extra

SECONDS = 5.0
PROGRAM = Path(__file__).with_name("templates.py")


class TemplateProcess:
    """Starts the process when it is first needed, and anew after one that was ended. Calls of
    several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(
        self, source: str, variables: dict[str, Any] | None, seconds: float = SECONDS
    ) -> dict[str, str]:
        """See `templates.render`. Raises UsageError where jinja2 is missing."""
        try:
            request = json.dumps([source, variables]) + "\n"
        except (RecursionError, ValueError):
            return {"error": "rejected", "words": "they, or the tools, are nested too deeply"}
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            start, timer = time.monotonic(), threading.Timer(seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                timer.cancel()
            if line.endswith("\n"):  # the process may have been ended in its midst
                answer: dict[str, str] = json.loads(line)
                return answer
            code = process.wait()
            self._process = None
        if time.monotonic() - start >= seconds:
            return {"error": "rejected", "words": f"it takes more than {seconds:g} seconds"}
        return {"error": "rejected", "words": f"its process ended with {code}"}

    def _started(self) -> subprocess.Popen[str]:
        """The process; after a fork, one of this process."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            if importlib.util.find_spec("jinja2") is None:
                raise SetupError(missing_extra(ModuleNotFoundError(name="jinja2")))
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, encoding="utf-8",
            )  # fmt: skip
            self._owner = os.getpid()
            weakref.finalize(self, _end, self._process, self._owner)
        return self._process


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """End the process; does nothing in a fork of its owner."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            assert stream is not None
            stream.close()


ROLES = ("system", "user", "assistant", "tool")
OF_TOOLS = {"tool_calls", "tool_call_id", "name"}
Message = Mapping[str, Any]
"""`role`, one of ROLES, and `content`, text; OF_TOOLS may be there too."""


@dataclass(frozen=True)
class ChatTemplate:
    """`tokens` are the special tokens that a template may refer to, such as bos_token."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text up to where the answer begins, which may call `tools`, the JSON schemas of
        functions as transformers has them. `options` are variables of this template, such as
        enable_thinking.

        Raises InputError where a message is malformed, the template refuses the messages or has a
        variable of an option's name in any case, ArtifactError where it is no template.
        """
        check_messages(messages)
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
            **({"tools": [*tools]} if tools else {}),
            **self.tokens,
        }
        if names := (variables.keys() | {"tools"}) & (options or {}).keys():
            raise InputError(f"{min(names)} is no option of a chat template: leave it out")
        return self._run({**variables, **(options or {})})

    def check(self) -> None:
        """Raises ArtifactError where it is no template."""
        self._run(None)

    @cached_property
    def _process(self) -> TemplateProcess:
        return TemplateProcess()

    def _run(self, variables: dict[str, Any] | None) -> str:
        answer = self._process.render(self.source, variables)
        if "text" in answer:
            return answer["text"]
        if answer["error"] == "malformed":
            raise ArtifactError(f"the chat template is malformed: {answer['words']}")
        raise InputError(f"the chat template rejects the messages: {answer['words']}")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError where there are none, or one is malformed."""
    if not messages:
        raise InputError("there are no messages: give at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() - OF_TOOLS != {"role", "content"}:
            raise InputError(f"message {number} is {message!r}; it has a role and a content")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise InputError(
                f"message {number} is {message!r}; its role is one of {', '.join(ROLES)}, and its "
                "content is text"
            )
