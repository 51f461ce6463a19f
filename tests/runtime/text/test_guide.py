"""Texts that keep to a grammar, with a tokenizer of bytes and a model that says anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moec.errors import InputError
from moec.runtime.text.guide import Grammars
from moec.runtime.text.prompt import bytes_of
from moec.runtime.text.request import Request
from moec.runtime.text.sampler import Sampler
from moec.runtime.text.sampling import Sampling

VOCABULARY = 300  # more than there are tokens, as models have
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(models.BPE({t: n for n, t in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<end>"])
    return built


TOKENIZER = tokenizer()
END = TOKENIZER.token_to_id("<end>")
GRAMMARS = Grammars(TOKENIZER, {END})


def speak(
    response_format: dict[str, Any], seed: int, most: int = 400, temperature: float = 1.0
) -> str:
    """What random logits say within a grammar; they favour what ends values."""
    request = Request(most, Sampling(temperature, seed=seed), frozenset([END]),
                      guide=GRAMMARS.guide(response_format))  # fmt: skip
    sampler, of, text = Sampler(request, [1], 0), bytes_of(TOKENIZER), b""
    draw = np.random.default_rng(seed)
    favoured = [END, *(TOKENIZER.token_to_id(c) for c in '"}]:,')]
    for _ in range(most):
        logits = draw.standard_normal(VOCABULARY).astype(np.float32)
        logits[favoured] += 4
        token, complete = sampler.draw(logits)
        text += of(token) if token != END else b""
        if complete:
            return text.decode()
    raise AssertionError(f"no end: {text!r}")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 2.0]))
def test_texts_of_a_schema(seed: int, temperature: float) -> None:
    format_ = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }
    value = json.loads(speak(format_, seed, 2000, temperature))
    assert value.keys() == {"name", "age"}
    assert isinstance(value["age"], int)
    assert len(value["name"]) <= 8


@pytest.mark.parametrize("seed", range(5))
def test_texts_that_are_objects(seed: int) -> None:
    assert isinstance(json.loads(speak({"type": "json_object"}, seed, 4000)), dict)


@pytest.mark.parametrize("seed", range(5))
def test_texts_of_a_regular_expression(seed: int) -> None:
    pattern = r"(yes|no), [0-9]{2,4}(ü|☃)"
    assert re.fullmatch(pattern, speak({"type": "regex", "regex": pattern}, seed))


def test_what_may_go_on_ends_with_a_stop_token() -> None:
    assert re.fullmatch("a[0-9]*", speak({"type": "regex", "regex": "a[0-9]*"}, 3))


def test_values_have_no_blanks_unless_their_schema_says_so() -> None:
    """A model that likes blanks best would write them to its end."""
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"const": [1, 2]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    for more, text in (({}, '{"a":[1,2]}'), ({"item_separator": ", "}, '{"a":[1, 2]}')):
        format_ = {"schema": {**schema, "x-guidance": more} if more else schema}
        assert speak({"type": "json_schema", "json_schema": format_}, 0) == text
    sampler = Sampler(Request(99, guide=GRAMMARS.guide({"type": "json_object"})), [1], 0)
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[TOKENIZER.token_to_id(blank) for blank in "ĠĊ"]] = 9
    tokens = [sampler.draw(logits)[0] for _ in range(2)]
    assert TOKENIZER.id_to_token(tokens[0]) == "{"
    assert TOKENIZER.id_to_token(tokens[1]) in '"}'


LARGE = (
    "(a{1000}){1000}",
    "(b{9}){99999}",
    "(((c{50}){50}){50}){50}",
    "d{99999}",
    "(ef{300}){900}",
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("together", [False, True], ids=["one", "side by side"])
def test_grammars_take_little_memory(together: bool) -> None:
    """15 characters of a regular expression took 250 MB."""
    code = (
        "import re, sys\nfrom pathlib import Path\n"
        "from tests.runtime.text.test_guide import GRAMMARS, LARGE, Sampler, Request, np\n"
        "held = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', "
        "Path('/proc/self/status').read_text())[1])\n"
        "start, kept = held(), []\n"
        "for pattern in LARGE:\n"
        "    request = Request(9, guide=GRAMMARS.guide({'type': 'regex', 'regex': pattern}))\n"
        "    sampler = Sampler(request, [1], 0)\n"
        "    try:\n"
        "        for _ in range(5):\n            sampler.draw(np.zeros(300, np.float32))\n"
        "    except Exception as error:\n        print(error, file=sys.stderr)\n"
        f"    kept += [sampler] * {together}\n"
        "print(held() - start >> 10)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) < (150 if together else 60), done.stderr
    assert (
        "no token fits response_format here: the grammar is too large: repeat less" in done.stderr
    )


def test_text_has_no_guide() -> None:
    assert GRAMMARS.guide({"type": "text"}) is None


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ({}, "response_format has the type None: give text, json_object, json_schema or regex"),
        ({"type": "xml"}, "response_format has the type 'xml'"),
        ({"type": "regex"}, "response_format: regex is None; it must be text"),
        ({"type": "regex", "regex": "a("}, "response_format: .*regex"),
        ({"type": "json_schema"}, "response_format: json_schema is None; it must be an object"),
        ({"type": "json_schema", "json_schema": {"schema": {"multipleOf": 99999999}}}, "5 digits"),
        ({"type": "json_schema", "json_schema": {}}, "schema is None; it must be an object"),
        (
            {
                "type": "json_schema",
                "json_schema": {"schema": {"enum": [f"name {number}" for number in range(50_000)]}},
            },
            "response_format: the grammar is too large: repeat less, or list less",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}},
            "response_format: .*colour",
        ),
    ],
)
def test_formats_that_are_refused(response_format: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        GRAMMARS.guide(response_format)
    assert "\n" not in str(caught.value)


def test_a_grammar_without_a_token_that_fits() -> None:
    """The model has fewer tokens than the tokenizer, and the grammar needs one of the others."""
    request = Request(9, guide=GRAMMARS.guide({"type": "regex", "regex": "é"}))
    with pytest.raises(InputError, match="no token fits response_format here"):
        Sampler(request, [1], 0).draw(np.zeros(5, np.float32))
