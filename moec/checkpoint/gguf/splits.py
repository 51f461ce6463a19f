r"""How byte-level tokenizers split texts before they merge, by the `tokenizer.ggml.pre` of a file.

transformers has the splits of some names, and takes GPT-2's for all others. Here are those that it
is right for, and splits of further ones as llama.cpp has them: each expression splits the pieces
of the one before. Of other names' splits, tokens would come that no model was trained on.
"""

from __future__ import annotations

from typing import Any

from moec.errors import CaptureError

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
