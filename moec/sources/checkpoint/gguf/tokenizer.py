"""The tokenizer and the chat template of a GGUF file, as the files of a transformers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moec.errors import CaptureError

_FIELDS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_prefix_space": "add_space_prefix",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_TYPES = ("gpt2", "llama")


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a file's fields; none
    where it has no tokens.

    Raises CaptureError where a field is damaged, or the kind of the vocabulary is not one that is
    read.
    """
    stored = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in _FIELDS.items()}
    if stored["tokens"] is None:
        return {}
    _check(stored)
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    settings = _settings(fields, stored["tokens"], stored["tokenizer_type"])
    present = {name: value for name, value in stored.items() if value is not None}
    try:
        backend, _ = convert_gguf_tokenizer(fields["general.architecture"], present)
        if stored["tokenizer_type"] == "gpt2":
            set_splits(backend, stored["pre_tokenizer_type"])
        # adds the tokens that begin and end a text
        tokenizer = TokenizersBackend(tokenizer_object=backend, **settings)
    except CaptureError:
        raise
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise CaptureError(f"its tokenizer cannot be read: {error}") from error
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    generation = {"eos_token_id": sorted({end for end in ends if isinstance(end, int)})}
    generation |= _sampling(fields)
    return {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """How the makers draw tokens, as llama.cpp reads it; floats with the digits that were meant."""
    named = {name: fields.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
    settings = {n: float(f"{v:.7g}") if isinstance(v, float) else v for n, v in named.items()}
    return {"do_sample": True} | settings if named["temperature"] else settings


def _check(stored: Mapping[str, Any]) -> None:
    """Raises CaptureError where a field is not of the type that the others need."""
    kind, tokens = stored["tokenizer_type"], stored["tokens"]
    if kind not in _TYPES:
        raise CaptureError(
            f"its tokenizer is of the kind {kind!r}; moec reads {' and '.join(_TYPES)}"
        )
    for name in ("tokens", "merges"):
        value = stored[name]
        texts = value is None or isinstance(value, list)
        if not texts or not all(isinstance(text, str) for text in value or ()):
            raise CaptureError(f"tokenizer.ggml.{_FIELDS[name]} is no list of texts")
    for name in ("scores", "token_type"):
        value = stored[name]
        if value is not None and (not isinstance(value, list) or len(value) != len(tokens)):
            raise CaptureError(f"tokenizer.ggml.{_FIELDS[name]} has no number for each token")
    if stored["merges"] is None and stored["scores"] is None:
        raise CaptureError("its tokenizer has neither merges nor scores")


def _settings(fields: Mapping[str, Any], tokens: list[str], kind: Any) -> dict[str, Any]:
    """Special tokens, whether they begin and end a text, and the chat template."""
    settings: dict[str, Any] = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    }
    for name, key in _SPECIAL.items():
        number = fields.get(f"tokenizer.ggml.{key}")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise CaptureError(f"tokenizer.ggml.{key} is {number!r}, and has to be a token")
        settings[name] = None if number is None else tokens[number]
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings


# How byte-level tokenizers split texts before they merge, by the `tokenizer.ggml.pre` of a file.
#
# transformers has the splits of some names, and takes GPT-2's for all others. Here are those that
# it is right for, and splits of further ones as llama.cpp has them: each expression splits the
# pieces of the one before. Of other names' splits, tokens would come that no model was trained on.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2 = ("gpt-2", "olmo", "jais", "trillion", "granite-docling", "phi-2", "gigachat")
_LETTERS = r"[\p{Lu}\p{Ll}\p{Lt}]"  # llama.cpp lists them, without mathematical alphabets
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_SINGLE_DIGITS = (r"\p{N}", _WORDS)
_GLM = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-llm": (
        *("[\r\n]", rf"\s?{_LETTERS}+", rf"\s?{_PUNCTUATION}", r"\s+$"),
        *(_HAN, r"\p{N}+"),
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("glm4", "glm5", "chatglm-bpe"), _GLM),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b"), _SINGLE_DIGITS),
}


def set_splits(backend: Any, name: Any) -> None:
    """Sets the split of the name in a byte-level tokenizer of the package tokenizers, which
    transformers made. Raises CaptureError for a name of which neither knows the split."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if name is None or name in _GPT2 or name in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if name not in SPLITS:
        raise CaptureError(
            f"tokenizer.ggml.pre is {name!r:.40}, whose split of texts moec does not have"
        )
    splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in SPLITS[name]]
    bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes])
