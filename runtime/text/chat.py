"""Chat templates: messages as the text that a model was trained to answer.

A template is a Jinja program that comes with an artifact, which may be untrusted: it runs in
Jinja's immutable sandbox, without access to files or Python. It can still run forever. Its
variables are those of Hugging Face's documentation of chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Never

from moec.errors import ArtifactError, InputError, UsageError
from moec.extras import missing_extra

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]
"""`role`, one of ROLES, and `content`."""


@dataclass(frozen=True)
class ChatTemplate:
    """`tokens` are the special tokens that a template may refer to, such as bos_token."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to where the answer begins.

        Raises InputError where a message is malformed or the template refuses the messages,
        ArtifactError where it is no template.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        check_messages(messages)
        try:
            template = _environment().from_string(self.source)
            text = template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self.tokens,
            )
        except TemplateSyntaxError as error:
            raise ArtifactError(f"the chat template is malformed: {error}") from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InputError(f"the chat template rejects the messages: {error}") from error
        return str(text)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError where there are none, or one is malformed."""
    if not messages:
        raise InputError("there are no messages: give at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise InputError(f"message {number} is {message!r}; it has a role and a content")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise InputError(
                f"message {number} is {message!r}; its role is one of {', '.join(ROLES)}, and its "
                "content is text"
            )


def _environment() -> Any:
    try:
        from jinja2 import sandbox
    except ModuleNotFoundError as error:
        raise UsageError(missing_extra(error)) from None
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """As Jinja's, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> Never:
    raise ValueError(message)
