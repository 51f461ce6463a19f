"""Text to tokens and back, with the artifact's tokenizer."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import index
from typing import Any

from moec.errors import ArtifactError, InputError, SetupError, UsageError
from moec.extras import missing_extra
from moec.runtime.text.chats.chat import ChatTemplate, Message
from moec.runtime.text.guide import Grammars
from moec.runtime.text.sampling import GREEDY, Sampling, configured

SPACE = "\u2581"  # a space in the tokens of SentencePiece


def bytes_of(tokenizer: Any) -> Callable[[int], bytes]:
    """A function from an id to the bytes of its token, for a `tokenizers.Tokenizer`.

    Tokens are written in one of three ways: each byte as a printable character (byte-level BPE of
    GPT-2), with spaces as U+2581 and single bytes as <0x0A> (SentencePiece), or as plain text.
    Added tokens are plain text in all. An id without a token has no bytes.
    """
    content = json.loads(tokenizer.to_str())
    added: dict[int, bytes] = {
        item["id"]: item["content"].encode() for item in content["added_tokens"]
    }
    decoder = json.dumps(content.get("decoder"))
    by_byte = _byte_characters() if '"ByteLevel"' in decoder else {}

    @cache
    def bytes_of_token(token: int) -> bytes:
        if token in added:
            return added[token]
        text: str = tokenizer.id_to_token(token) or ""
        if by_byte and all(character in by_byte for character in text):
            return bytes(by_byte[character] for character in text)
        if single := re.fullmatch("<0x([0-9A-F]{2})>", text):
            return bytes([int(single[1], 16)])
        return text.replace(SPACE, " ").encode()

    return bytes_of_token


def _byte_characters() -> dict[str, int]:
    """The byte of each character of a byte-level token: printable ones of Latin-1 for
    themselves, and the characters from U+0100 on for the others, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


FOLDER = "tokenizer/"
GENERATION = "generation_config.json"
LONG = 10_000  # characters or tokens that take more than milliseconds


@dataclass(frozen=True, repr=False)
class Tokenizer:
    """`stop` are the tokens that end a text; `template` is the chat template, None without one.
    `sampling` is how the model's makers draw tokens."""

    tokenizer: Any
    stop: frozenset[int]
    template: ChatTemplate | None = None
    sampling: Sampling = GREEDY

    def __repr__(self) -> str:
        chats = ", with a chat template" if self.template else ""
        return f"<tokenizer of {self.tokenizer.get_vocab_size()} tokens{chats}>"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; with `special`, including the tokens that begin and end a text.

        Raises InputError where it is no string, UsageError where it is not Unicode, or gives no
        token.
        """
        if not isinstance(text, str):
            raise InputError(f"the prompt is {reprlib.repr(text)}: give text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is not UTF-8 at character {error.start}: convert it first"
            ) from error
        if len(text) < LONG:
            encoded = self.tokenizer.encode(text, add_special_tokens=special)
        else:  # other threads may run meanwhile
            (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=special)
        tokens: list[int] = encoded.ids
        if not tokens:
            raise UsageError("the prompt encodes to no tokens: write at least one character")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens. Raises InputError for anything but ids."""
        try:
            token_ids = [*map(index, tokens)]
        except TypeError:
            token_ids = [-1]
        if not all(0 <= token < 1 << 32 for token in token_ids):
            raise InputError(f"the tokens are {reprlib.repr(tokens)}: give a list of token ids")
        if len(token_ids) < LONG:
            return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        return str(self.tokenizer.decode_batch([token_ids], skip_special_tokens=True)[0])

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), begun: str = ""
    ) -> list[int]:
        """The tokens of a chat, up to the beginning of the answer (`ChatTemplate.render`) and with
        the characters of it that are `begun`.

        Raises UsageError as `check_chat`.
        """
        return self.encode(self.check_chat().render(messages, tools) + begun, special=False)

    def check_chat(self) -> ChatTemplate:
        """The template. Raises UsageError where the model came without one."""
        if self.template is None:
            raise SetupError(
                "the model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): continue plain text, with moec run --prompt"
            )
        return self.template

    def decoder(self, prompt: Sequence[int], special: bool = False) -> Callable[[int], str]:
        """A function that takes the tokens after `prompt` one by one, and returns the characters
        that each completes, perhaps none; with `special`, those of special tokens too."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=list(prompt), skip_special_tokens=not special)
        return lambda token: stream.step(self.tokenizer, token) or ""

    @cached_property
    def bytes_of(self) -> Callable[[int], bytes]:
        """The bytes of a token, which may be a part of a character; of a special one its text."""
        return bytes_of(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars that texts may keep to. Raises UsageError where llguidance is missing."""
        return Grammars(self.tokenizer, self.stop)


def load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer among an artifact's files.

    Raises ArtifactError where there is none or it is malformed, and UsageError where the
    `tokenizers` package is missing.
    """
    content = files.get(FOLDER + "tokenizer.json")
    if content is None:
        raise ArtifactError(
            "the artifact has no tokenizer; compile a Hugging Face checkpoint folder that has a "
            "tokenizer.json, or give tokens with --input"
        )
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise SetupError(missing_extra(error)) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ArtifactError(f"{FOLDER}tokenizer.json is malformed: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer, _stop(tokenizer, files), _template(files), _sampling(files))


def text_notes(files: Mapping[str, bytes]) -> tuple[str, ...]:
    """What is wrong with the chat template and the sampling among an artifact's files, if that can
    be told here."""
    try:
        _sampling(files)
    except ArtifactError as error:
        return (f"{error}: prompts are refused",)
    try:
        if template := _template(files):
            template.check()
    except ArtifactError as error:
        return (f"{error}: chats are refused",)
    except UsageError:  # jinja2 is not installed
        return ()
    return ()


def _template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    config = _json(files, "tokenizer_config.json")
    content = files.get(FOLDER + "chat_template.jinja")
    source = (
        content.decode(errors="replace") if content is not None else config.get("chat_template")
    )
    if isinstance(source, list):  # of several, each {"name": ..., "template": ...}
        named = [item for item in source if isinstance(item, dict)]
        source = next((t.get("template") for t in named if t.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    values = {name: config.get(name) for name in names}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
    return ChatTemplate(source, {n: text for n, text in texts.items() if isinstance(text, str)})


def _stop(tokenizer: Any, files: Mapping[str, bytes]) -> frozenset[int]:
    for name in (GENERATION, "config.json"):
        token_ids = _json(files, name).get("eos_token_id")
        if isinstance(token_ids, int):
            return frozenset([token_ids])
        if isinstance(token_ids, list):
            return frozenset(token for token in token_ids if isinstance(token, int))
    token = _json(files, "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    token_ids = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return frozenset() if token_ids is None else frozenset([token_ids])


def _sampling(files: Mapping[str, bytes]) -> Sampling:
    try:
        return configured(_json(files, GENERATION))
    except InputError as error:
        rule = "correct it in the checkpoint, and compile again"
        raise ArtifactError(f"{FOLDER}{GENERATION}: {error}: {rule}") from error


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(FOLDER + name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{FOLDER}{name} is malformed: {error}") from error
    return content if isinstance(content, dict) else {}
