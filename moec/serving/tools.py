"""Functions that a client offers to a chat, and how the calls of them are read."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from moec.errors import MoecError
from moec.runtime.text.calls import CallForm, CallReader, FunctionCall, call_form, schema_of_call
from moec.runtime.text.guide import Guide
from moec.runtime.text.prompt import Tokenizer
from moec.serving.errors import invalid

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$(?!\n)")]


class OfferedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """`parameters` is the JSON schema of the arguments, {} for any object."""

    name: Name
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """The only kind of tool is a function."""

    type: Literal["function"]
    function: OfferedFunction


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """The function that is to be called."""

    name: Name


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """A call in an earlier answer; `arguments` is the JSON text of an object."""

    name: Name
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call in an earlier answer, which a message of the role tool answers by its id."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}

    def check(self, name: str) -> None:
        """Raises ApiError where the arguments are no JSON object."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise invalid(f"{name}.function.arguments", "it is not the JSON text of an object")


@dataclass(frozen=True)
class ToolUse:
    """How the answer of a chat may call `tools`: one of `callable_names` must be called where
    `forced`, in a text that follows `form.begin`; only the first call counts unless `parallel`.
    `special`: the markers of calls are special tokens."""

    form: CallForm
    tools: Sequence[Tool]
    callable_names: tuple[str, ...]
    forced: bool
    parallel: bool
    special: bool

    @property
    def begun(self) -> str:
        """What the answer begins with."""
        if not self.forced:
            return ""
        return self.form.begin if self.form.listed else f"{self.form.begin}\n"

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.parallel or not self.form.end else (self.form.end,)

    @property
    def for_template(self) -> list[Any]:
        """As transformers gives them to templates."""
        return [msgspec.to_builtins(tool) for tool in self.tools]

    def reader(self) -> CallReader:
        return CallReader(self.form, self.callable_names, self.forced)

    def guide(self, tokenizer: Tokenizer) -> Guide | None:
        """The grammar of a forced call. Raises ApiError where there is none for its schema."""
        if not self.forced:
            return None
        functions: Mapping[str, Any] = {
            tool.function.name: tool.function.parameters
            for tool in self.tools
            if tool.function.name in self.callable_names
        }
        schema = {"schema": schema_of_call(self.form, functions)}
        try:
            return tokenizer.grammars.guide({"type": "json_schema", "json_schema": schema})
        except MoecError as error:
            raise invalid("tools", str(error)) from error


def tool_use(
    tools: Sequence[Tool], choice: ToolChoice, parallel: bool, tokenizer: Tokenizer
) -> ToolUse | None:
    """None where no tool may be called.

    Raises ApiError where the chat template has no calls that are read here, a chosen tool is
    absent, or one is strict and calls are not held to its schema.
    """
    if not tools or choice == "none":
        return None
    names = tuple(tool.function.name for tool in tools)
    template = tokenizer.template
    form = None if template is None else call_form(template.source)
    if form is None:
        raise invalid("tools", "the model's chat template has no calls of functions in JSON")
    if len(set(names)) < len(names):
        raise invalid("tools", "two functions have the same name")
    forced = choice != "auto"
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise invalid("tool_choice", f"{choice.function.name} is not among the tools")
        names = (choice.function.name,)
    if not forced and any(tool.function.strict for tool in tools):
        rule = "arguments are held to the schema where a call is required: leave strict out"
        raise invalid("tools", f"{rule}, or set tool_choice")
    special = form.begin not in tokenizer.decode(tokenizer.encode(form.begin, special=False))
    return ToolUse(form, tools, names, forced, parallel, special)


def shown_call(call: FunctionCall) -> dict[str, Any]:
    """As OpenAI shows it, with an id."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
