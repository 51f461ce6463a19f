"""The tokenizer of a folder as the fields of a GGUF file: the inverse of checkpoint/gguf/tokenizer.

llama.cpp has two kinds that are read here: "gpt2", BPE of bytes, whose rule for splitting a text
has a name, and "llama", BPE of SentencePiece, whose merges follow from scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import CaptureError
from moec.runtime.text.prompt import FOLDER, load_tokenizer
from moec.sources.checkpoint.gguf.tokenizer import tokenizer_files

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTES = range(1, 7)
_SAMPLE = (
    "It's 12345 o'clock,  we'll\n\n  see: naïve café, 你好 🙂 x_1 != y[2]\t(ALL CAPS)\r\n",
    "def f(x):\n    return x**2  # 3.14",
)
"""Texts whose tokens have to be the same after a round trip."""


@dataclass(frozen=True)
class _Kind:
    """The kind of a vocabulary, and the name of the rule by which a text is split first."""

    model: str
    pre: str
    add_space_prefix: bool


def tokenizer_fields(
    files: Mapping[str, bytes], architecture: str, vocabulary: int, ends: tuple[int, ...]
) -> dict[str, Any]:
    """The fields of tokenizer.json and tokenizer_config.json for a model with `vocabulary` rows of
    embeddings, in which the tokens `ends` end a text. Without a tokenizer.json, none.

    Raises CaptureError for a tokenizer of another kind, or whose tokens would be others.
    """
    if "tokenizer.json" not in files:
        return {"tokenizer.ggml.model": "none"}
    from tokenizers import Tokenizer

    stored = json.loads(files["tokenizer.json"])
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = _kind(stored)
    backend = Tokenizer.from_str(files["tokenizer.json"].decode())
    if backend.get_vocab_size() > vocabulary:
        raise CaptureError(
            f"tokenizer.json has {backend.get_vocab_size()} tokens, and the model embeds only "
            f"{vocabulary}: they are of different models"
        )
    types = {t["id"]: _CONTROL if t["special"] else _USER for t in stored["added_tokens"]}
    tokens = [backend.id_to_token(i) for i in range(vocabulary)]
    unknown = stored["model"].get("unk_token")
    fields: dict[str, Any] = {
        "model": kind.model,
        "pre": kind.pre,
        "tokens": [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)],
        "token_type": [_type(kind, t, types.get(i), unknown) for i, t in enumerate(tokens)],
    }
    merges = [m.split(" ") if isinstance(m, str) else m for m in stored["model"]["merges"]]
    if kind.model == "gpt2":
        fields["merges"] = [" ".join(pair) for pair in merges]
    else:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        fields["scores"] = [-float(ranks.get(token or "", len(merges))) for token in tokens]
        fields["add_space_prefix"] = kind.add_space_prefix
    inner, outer = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    fields["add_bos_token"] = outer[: -len(inner)] != [] and outer[-len(inner) :] == inner
    fields["add_eos_token"] = False
    if len(outer) > len(inner) + fields["add_bos_token"]:
        raise CaptureError("tokenizer.json adds tokens to a text that a GGUF file does not name")
    for name, key in _SPECIAL.items():
        token = settings.get(name)
        number = backend.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        if number is not None:
            fields[key] = number
    first = fields.setdefault("eos_token_id", ends[0]) if ends else fields.get("eos_token_id")
    if others := [end for end in ends if end != first]:
        fields["eot_token_id"] = others[0]
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    template = files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if isinstance(template, str):
        named["tokenizer.chat_template"] = template
    _check_tokens(files, {"general.architecture": architecture, **named})
    return named


def _type(kind: _Kind, token: str | None, added: int | None, unknown: str | None) -> int:
    if token is None:
        return _UNUSED
    if kind.model == "llama":
        if token == unknown:
            return _UNKNOWN
        if _BYTE.fullmatch(token):
            return _BYTES
    return added or _NORMAL


def _kind(stored: Mapping[str, Any]) -> _Kind:
    """Raises CaptureError for what llama.cpp has no rule for."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    model, before = stored["model"], stored.get("pre_tokenizer") or {}
    normal = stored.get("normalizer") or {}
    parts = before.get("pretokenizers", [before])
    last = parts[-1]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        steps = [step["type"] for step in normal.get("normalizers", [normal] if normal else [])]
        if not before and steps in (["Prepend", "Replace"], ["Replace"]):
            return _Kind("llama", "default", "Prepend" in steps)
        if before.get("type") == "Metaspace" and not normal:
            return _Kind("llama", "default", before.get("prepend_scheme") != "never")
    elif (
        model["type"] == "BPE" and last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    ):
        names: dict[str, str] = {}
        for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
            names.setdefault(pattern, name)
        pre = "gpt-2" if len(parts) == 1 and last.get("use_regex", True) else None
        if len(parts) == 2 and parts[0]["type"] == "Split" and not last.get("use_regex", True):
            pre = names.get(parts[0]["pattern"].get("Regex"))
        whole_words = pre in ("llama3", "tekken")  # whose words need no merges in llama.cpp
        fits = whole_words or not model.get("ignore_merges")
        if pre is not None and fits and normal.get("type") in (None, "NFC"):
            return _Kind("gpt2", pre, False)
    raise CaptureError(
        f"tokenizer.json ({model['type']}, split by {before.get('type', 'nothing')}) is of a kind "
        "that moec cannot write for llama.cpp: it writes byte-level BPE as of GPT-2, Llama 3 and "
        "Qwen, and BPE of SentencePiece; remove tokenizer.json for a file without tokens"
    )


def _check_tokens(files: Mapping[str, bytes], fields: Mapping[str, Any]) -> None:
    """Raises CaptureError where a text has other tokens after a round trip."""
    written, source = (
        load_tokenizer({f"{FOLDER}{name}": content for name, content in each.items()})
        for each in (tokenizer_files(fields), files)
    )
    for text in _SAMPLE:
        if written.encode(text, special=False) != source.encode(text, special=False):
            raise CaptureError(
                f"tokenizer.json gives {text[:20]!r}… other tokens than llama.cpp's "
                f"{fields['tokenizer.ggml.pre']} of the same vocabulary; remove tokenizer.json for "
                "a file without tokens"
            )
