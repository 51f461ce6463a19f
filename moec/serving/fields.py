"""The fields of requests: each is honoured, ignored as listed here, or refused by its name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from moec.runtime.text.sampling import Sampling
from moec.serving.errors import ApiError, invalid
from moec.serving.tools import Tool, ToolCall, ToolChoice

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),  # of chats
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "suffix": ("",),
    "modalities": (["text"],),
}
"""What is not supported, with the values that change nothing."""

UNKNOWN = "this field is not known, or not supported: leave it out"
COMPLETION = "max_completion_tokens"
OF_TEXTS = ("best_of", "echo")
OF_CHATS = (
    *("messages", COMPLETION, "tools", "tool_choice", "parallel_tool_calls"),
    *("reasoning_effort", "chat_template_kwargs"),
)
Stop: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1000)]
Count: TypeAlias = Annotated[int, Meta(ge=1)]
Share: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
MOST_LOGPROBS = 20
MOST_VALUES = 1_000_000  # of a body, each of which takes time in Python
DEEPEST = 100  # objects and lists in one another
MOST_TEXTS = 2048  # of embeddings, as OpenAI has it
SHORT = 16  # max_tokens of a completion without one, as OpenAI has it


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of the content of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """A message of a chat; the developer is the system."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[ContentPart] | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        role, content = "system" if self.role == "developer" else self.role, self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": role, "content": content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})

    def check(self, name: str) -> None:
        """Raises ApiError where it has what its role has not, or no content and no calls."""
        if self.tool_calls and self.role != "assistant":
            raise invalid(f"{name}.tool_calls", f"a message of the {self.role} has none")
        if self.tool_call_id and self.role != "tool":
            raise invalid(f"{name}.tool_call_id", f"a message of the {self.role} has none")
        if self.content is msgspec.UNSET and not self.tool_calls:
            raise invalid(name, "missing required field `content`")
        for number, call in enumerate(self.tool_calls):
            call.check(f"{name}.tool_calls[{number}]")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Whether a last chunk has the usage."""

    include_usage: bool = False


class Fields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of requests have. A text has as many tokens as there is room for where both
    maxima are None."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool = False
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] = []
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Bias] = {}
    logprobs: bool | Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Count | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Meta(max_length=1000)] = []
    response_format: dict[str, Any] = {}
    prompt: str | list[str | int | list[int]] = []
    messages: list[ChatMessage] = []
    tools: Annotated[list[Tool], Meta(max_length=128)] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        """Variables of the chat template."""
        effort = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        return effort | self.chat_template_kwargs

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are drawn: what is given, else the model's default, where the temperature is 1
        if that takes the likeliest token."""
        if not default.temperature:
            default = default.changed({"temperature": 1.0})
        bias = tuple((int(token), bias) for token, bias in self.logit_bias.items())
        values = {n: value for n in SAMPLING if (value := getattr(self, n)) is not None}
        if self.temperature == 0:  # the likeliest token is within any limits
            values = {n: values[n] for n in values if n == "temperature" or n.endswith("_penalty")}
        elif self.top_k is not None:
            values["top_k"] = max(self.top_k, 0) or None
        return default.changed({**values, "logit_bias": bias})

    @property
    def scores(self) -> int | None:
        """The number of likeliest tokens with log probabilities beside each token; None for no
        log probabilities."""
        if self.messages:
            return (self.top_logprobs or 0) if self.logprobs else None
        return None if self.logprobs is False else int(self.logprobs)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple([self.stop] if isinstance(self.stop, str) else self.stop)

    @property
    def count(self) -> int:
        """How many texts are computed."""
        return (1 if self.messages else len(self.prompts)) * (self.best_of or self.n)

    @property
    def prompts(self) -> list[Any]:
        """Texts, and lists of tokens."""
        if isinstance(self.prompt, list) and not any(isinstance(p, int) for p in self.prompt):
            return self.prompt
        return [self.prompt]


def read_fields(body: dict[str, Any], chat: bool) -> Fields:
    """Raises ApiError, naming the field, for one that is wrong, unknown or unsupported."""
    present = {name: value for name, value in body.items() if name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        if not chat and name in OF_TEXTS:
            continue
        if name in present and present.pop(name) not in neutral:
            raise invalid(name, "this field is not supported: leave it out")
    needed, others = ("messages", {"prompt"}) if chat else ("prompt", {*OF_CHATS})
    if not present.get(needed):
        raise invalid(needed, "it is missing or empty")
    for name in others & present.keys():
        raise invalid(name, UNKNOWN)
    if {"max_tokens", COMPLETION} <= present.keys():
        raise invalid("max_tokens", f"{COMPLETION} means the same: leave one out")
    try:
        fields = msgspec.convert(present, Fields)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    if fields.stream_options and not fields.stream:
        raise invalid("stream_options", "it needs stream: true")
    if fields.max_tokens == 0 and not fields.echo:
        raise invalid("max_tokens", "expected `int` >= 1, or echo: true")
    if fields.best_of is not None and (fields.best_of < fields.n or fields.stream):
        raise invalid("best_of", f"it must be at least n, {fields.n}, and is not for streams")
    if not chat and fields.max_tokens is None:
        fields.max_tokens = SHORT
    if not isinstance(fields.logprobs, bool) and chat:
        raise invalid("logprobs", "expected `bool`: top_logprobs is their number")
    if fields.logprobs is True and not chat:
        raise invalid("logprobs", "expected `int`: the number of likeliest tokens")
    for number, message in enumerate(fields.messages):
        message.check(f"messages[{number}]")
    if fields.tools and fields.response_format:
        raise invalid("response_format", "it cannot be combined with tools: leave one out")
    if fields.top_logprobs is not None and not (chat and fields.logprobs):
        raise invalid("top_logprobs", "it needs a chat, and logprobs: true")
    if not all(re.fullmatch("[0-9]{1,18}", token) for token in fields.logit_bias):
        raise invalid("logit_bias", 'its keys are token ids, such as "50"')
    if not isinstance(fields.prompt, str) and len({type(item) for item in fields.prompt}) > 1:
        raise invalid("prompt", "give texts, or tokens, not both")
    return fields


class EmbeddingFields(msgspec.Struct, forbid_unknown_fields=True):
    """A text, tokens, or a list of either."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def texts(self) -> list[Any]:
        """Texts, and lists of tokens."""
        alone = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if alone else [*self.input]


def read_embedding_fields(body: dict[str, Any]) -> EmbeddingFields:
    """Raises ApiError, naming the field, for one that is wrong, unknown or unsupported."""
    present = {name: value for name, value in body.items() if name not in IGNORED}
    if "dimensions" in present:
        rule = "embeddings have all dimensions of the model's hidden states: leave it out"
        raise invalid("dimensions", rule)
    try:
        fields = msgspec.convert(present, EmbeddingFields)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    if not fields.input:
        raise invalid("input", "it is missing or empty")
    if not isinstance(fields.input, str) and len({type(item) for item in fields.input}) > 1:
        raise invalid("input", "give texts, or tokens, not both")
    if len(fields.texts) > MOST_TEXTS:
        raise invalid("input", f"{len(fields.texts)} texts: a request has at most {MOST_TEXTS}")
    return fields


def _refusal(text: str) -> ApiError:
    """msgspec's sentence, such as: Expected `int` >= 1 - at `$.n`."""
    rule, _, path = text.partition(" - at `$")
    path = path.strip("`.")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", rule, re.DOTALL):
        path = ".".join(filter(None, (path, unknown[1])))
        rule = UNKNOWN
    return invalid(path, rule[:1].lower() + rule[1:])


def json_body(content: bytes) -> dict[str, Any]:
    """The object in a body, without its nulls. Raises ApiError where it is none."""
    if sum(map(content.count, b",[{")) > MOST_VALUES:
        raise ApiError(413, f"the body has more than {MOST_VALUES} values: send fewer")
    try:
        body = _without_nulls(msgspec.json.decode(content))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object: give one with the fields of the request")
    return body


def _without_nulls(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, dict | list):
        return value
    if depth == DEEPEST:
        raise ValueError(f"objects and lists are nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return [_without_nulls(item, depth + 1) for item in value]
    return {n: _without_nulls(item, depth + 1) for n, item in value.items() if item is not None}
