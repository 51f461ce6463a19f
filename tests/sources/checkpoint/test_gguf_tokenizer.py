"""The tokenizer of a GGUF file gives the tokens of the tokenizer that it was written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from moec.errors import CaptureError
from moec.runtime.text.prompt import FOLDER, Tokenizer, load_tokenizer
from moec.sources.checkpoint.gguf.tokenizer import tokenizer_files

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def fields_of(tokenizer: Backend, **changes: Any) -> dict[str, Any]:
    """The fields that llama.cpp's converter writes for a byte-level tokenizer."""
    stored = json.loads(tokenizer.to_str())
    special = {token["content"] for token in stored["added_tokens"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3 if token in special else 1 for token in tokens],
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items()}
    return {"general.architecture": "llama", **named}


def loaded(fields: dict[str, Any]) -> Tokenizer:
    files = tokenizer_files(fields)
    return load_tokenizer({f"{FOLDER}{name}": content for name, content in files.items()})


@pytest.fixture(scope="module")
def original(tiny_moe: Path) -> Backend:
    return Backend.from_file(str(tiny_moe / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(original: Backend) -> Tokenizer:
    return loaded(fields_of(original))


@settings(max_examples=60)
@given(text=st.text(min_size=1, max_size=40))
def test_texts_have_the_same_tokens(original: Backend, tokenizer: Tokenizer, text: str) -> None:
    expected = original.encode(text, add_special_tokens=False).ids
    if expected:
        assert tokenizer.encode(text, special=False) == expected
        assert tokenizer.decode(expected) == original.decode(expected)


def test_chat_template_and_tokens_that_begin_and_end_a_text(original: Backend) -> None:
    fields = fields_of(original, bos_token_id=5, eos_token_id=6, eot_token_id=7, add_bos_token=True)
    tokenizer = loaded({**fields, "tokenizer.chat_template": TEMPLATE})
    assert tokenizer.encode("a b")[0] == 5
    assert tokenizer.stop == {6, 7}
    assert tokenizer.template is not None
    assert tokenizer.template.render([{"role": "user", "content": "hi"}]) == "<user>hi"


PIECES = {
    "gpt-2": ["it", "'s", " 12345", "!!", "\n", "\n", "x"],
    "smollm": ["it", "'s", " ", "1", "2", "3", "4", "5", "!!", "\n", "\n", "x"],
    "llama-bpe": ["it", "'s", " ", "123", "45", "!!\n\n", "x"],
    "glm4": ["it", "'s", " ", "123", "45", "!!\n\n", "x"],
    "deepseek-v3": ["it", "'s", " ", "123", "45", "!!\n\n", "x"],
    "deepseek-llm": ["it", "'", "s", " ", "12345", "!!", "\n", "\n", "x"],
    "deepseek-coder": ["it", "'", "s", " ", "1", "2", "3", "4", "5", "!!", "\n", "\n", "x"],
    "falcon": ["it", "'", "s", " ", "123", "45", "!!", "\n", "\n", "x"],
}
"""By the name of a split, the pieces of a text, worked out from llama.cpp's expressions."""


@pytest.mark.parametrize("name", PIECES)
def test_splits(original: Backend, name: str) -> None:
    text = "it's 12345!!\n\nx"
    files = tokenizer_files(fields_of(original, pre=name))
    split = Backend.from_str(files["tokenizer.json"].decode()).pre_tokenizer
    pieces = [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]
    assert pieces == PIECES[name]


def test_a_vocabulary_of_sentencepiece() -> None:
    """Merges follow from the scores; unknown characters are bytes, and a text begins with a space
    and with the token that begins a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "ab", "▁ab"]
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-5.0, -4.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = loaded(fields)
    ids = tokenizer.encode("ab é")
    assert ids == [1, pieces.index("▁ab"), pieces.index("▁"), *(3 + b for b in "é".encode())]
    assert tokenizer.decode(ids) == "ab é"


def test_a_file_without_tokens_has_no_tokenizer() -> None:
    assert tokenizer_files({"general.architecture": "llama"}) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, r"its tokenizer is of the kind 'bert'; moec reads gpt2 and llama"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is no list of texts"),
        ({"pre": "bloom"}, r"tokenizer\.ggml\.pre is 'bloom', whose split of texts moec does not"),
        ({"merges": "a b"}, r"tokenizer\.ggml\.merges is no list of texts"),
        ({"merges": None}, r"its tokenizer has neither merges nor scores"),
        ({"merges": ["no such pair"]}, r"its tokenizer cannot be read"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type has no number for each token"),
        ({"bos_token_id": 1 << 40}, r"tokenizer\.ggml\.bos_token_id is 1099511627776, and has to"),
        ({"eos_token_id": "2"}, r"tokenizer\.ggml\.eos_token_id is '2', and has to be a token"),
    ],
)
def test_damaged_fields(original: Backend, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        tokenizer_files(fields_of(original, **changes))
