"""Text from text: streamed pieces, stop strings, batches, chat templates."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import moec
from moec.errors import ArtifactError, InputError, UsageError
from moec.runtime.artifact import artifact
from moec.runtime.text.chats.chat import ChatTemplate, TemplateProcess
from moec.runtime.text.prompt import load_tokenizer, text_notes
from moec.runtime.text.write_text import StopCut
from tests.command_line import invoke
from tests.runtime import toy

TEMPLATE = (
    "{% for message in messages %}{{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)
SLOW = pytest.mark.filterwarnings("ignore:slow")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which a is followed by b, and so on; h ends a text."""
    path = tmp_path_factory.mktemp("chat") / "chat.moec"
    config = json.dumps({"chat_template": TEMPLATE}).encode()
    files = toy.tokenizer_files() | {"tokenizer/tokenizer_config.json": config}
    artifact.write(toy.language_model(), path, graphs={"main": toy.GRAPH}, files=files)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> moec.LoadedModel:
    return moec.load(path)


@SLOW
def test_text_gives_text(model: moec.LoadedModel) -> None:
    assert model.generate("b c", max_new_tokens=2) == "b c d e"
    assert model.generate(["b c", "e"]) == ["b c d e f g", "e f g"]
    assert list(model.stream("b c")) == [" d", " e", " f", " g"]
    assert list(model.stream(["b c", "e"]))[:3] == [(" d", " f"), (" e", " g"), (" f", "")]


@SLOW
def test_strings_that_end_a_text(model: moec.LoadedModel) -> None:
    assert model.generate("a", stop="e f") == "a b c d "
    assert model.generate("a", stop=["x", "d"]) == "a b c "
    assert model.generate("a", stop=[3]) == "a b c"
    assert model.generate(["a", "d"], stop="e") == ["a b c d ", "d "]
    with pytest.raises(InputError, match="a string ends prompts that are text, not tokens"):
        model.generate([[1]], stop="e")
    with pytest.raises(InputError, match="each must be a string"):
        model.generate("a", stop="")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_is_cut_before_the_first_of_some_strings(text: str, stops: list[str]) -> None:
    cut = StopCut(tuple(stops))
    pieces = []
    for character in text:
        if not cut.ended:
            pieces.append(cut.feed(character))
    written = "".join(pieces) + cut.flush()
    # The first that is complete ends the text: characters come one by one.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    starts = [start for end, start in ends if end == first]
    assert written == (text[: min(starts)] if starts else text)


def test_the_tokenizer(model: moec.LoadedModel) -> None:
    assert model.tokenizer.encode("b c") == [1, 2]
    assert model.tokenizer.decode([1, 2]) == "b c"
    chat = [{"role": "user", "content": "a b"}]
    assert model.tokenizer.chat(chat) == [0, 1, 2]


@SLOW
def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    artifact.write(toy.language_model(), path := tmp_path / "x.moec", graphs={"main": ""})
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        moec.load(path).generate("a")


@pytest.mark.parametrize(
    ("source", "messages", "error", "words"),
    [
        (TEMPLATE, [], InputError, "there are no messages"),
        (TEMPLATE, ["a"], InputError, "message 0 is 'a'; it has a role and a content"),
        (TEMPLATE, [{"role": "me", "content": "a"}], InputError, "its role is one of system, user"),
        ("{% if %}", None, ArtifactError, "the chat template is malformed"),
        ("{{ raise_exception('no tools') }}", None, InputError, "rejects the messages: no tools"),
        ("{{ messages.append(1) }}", None, InputError, "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", None, InputError, "access to attribute '__class__'"),
        ("{% include '/etc/passwd' %}", None, InputError, "rejects the messages"),
        ("{{ range(10 ** 9) | list }}", None, InputError, "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", None, InputError, "it needs more than 512 MB"),
        ("{{ '%1000000000d' | format(1) | upper }}", None, InputError, "more than 512 MB"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", None, InputError, "calls itself too"),
        ("{% set a = 'a' %}{{ a\n}}{% bad %}", None, ArtifactError, "malformed: line 2: Encount"),
    ],
)
def test_templates_are_in_a_sandbox(source: str, messages: Any, error: Any, words: str) -> None:
    output = [{"role": "user", "content": "a"}] if messages is None else messages
    with pytest.raises(error) as caught:
        ChatTemplate(source).render(output)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c", "abuserc"),
        ("{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}", "21"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "ü"}]'),
        ("{{ messages | tojson(ensure_ascii=True) }}", '[{"role": "user", "content": "\\u00fc"}]'),
        (
            "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}",
            '{"content":"ü","role":"user"}',
        ),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}x", "x"),
    ],
)
def test_templates_have_what_those_of_transformers_have(source: str, text: str) -> None:
    messages = [{"role": "user", "content": "ü"}]
    assert ChatTemplate(source).render(messages) == text
    assert render_jinja_template([messages], chat_template=source)[0] == [text]


def test_a_malformed_template_is_noted_when_the_model_is_compiled(
    tiny_moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_moe, folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n{% if %}")
    compiled = moec.compile(folder, build=False, verify=False)
    (note,) = [note for note in compiled.source.notes if "template" in note]
    assert note.startswith("the chat template is malformed: line 2: ")
    assert note.endswith(": chats are refused")
    assert text_notes({"tokenizer/chat_template.jinja": b"{{ bos_token }}"}) == ()
    assert text_notes({}) == ()
    odd = {"tokenizer/generation_config.json": b'{"do_sample": true, "top_p": 1.5}'}
    (note,) = text_notes(odd)
    assert "top_p is 1.5; it must be above 0 and at most 1: correct it in the checkpoint" in note


def test_a_template_without_end_is_ended() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    process = TemplateProcess()
    answer = process.render(endless, {}, seconds=0.5)
    assert answer == {"error": "rejected", "words": "it takes more than 0.5 seconds"}
    assert process.render("{{ 1 + 1 }}", {}) == {"text": "2"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_fork_leaves_the_process_of_templates_alone() -> None:
    program = (
        "import os, sys\n"
        "from moec.runtime.text.chats.chat import TemplateProcess\n"
        "process = TemplateProcess()\n"
        "process.render('a', {})\n"
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(process._process.poll(), process.render('b', {}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "None {'text': 'b'}\n", done.stderr


def test_where_a_template_stands() -> None:
    files = toy.tokenizer_files()
    with pytest.raises(UsageError, match="has no chat template"):
        load_tokenizer(files).chat([{"role": "user", "content": "a"}])
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{bos_token}}"}]
    config = {"chat_template": several, "bos_token": {"content": "a"}}
    tokenizer = load_tokenizer(
        files | {"tokenizer/tokenizer_config.json": json.dumps(config).encode()}
    )
    assert tokenizer.chat([{"role": "user", "content": "b"}]) == [0]
    tokenizer = load_tokenizer(files | {"tokenizer/chat_template.jinja": b"b c"})
    assert tokenizer.chat([{"role": "user", "content": "b"}]) == [1, 2]


def run(*words: object, stdin: str = "") -> Any:
    return invoke("run", *words, "-q", input=io.BytesIO(stdin.encode()))


def test_prompts_from_files_and_stdin(path: Path, tmp_path: Path) -> None:
    (lines := tmp_path / "p.txt").write_text("b c\n\ne\na\n")
    done = run(path, "--prompts", lines, "--batch", 2)
    assert done.exit_code == 3
    rows = sorted((json.loads(line) for line in done.stdout.splitlines()), key=itemgetter("index"))
    assert rows == [
        {"index": 0, "prompt": "b c", "text": " d e f g", "tokens": 4},
        {"index": 1, "error": "the prompt is empty"},
        {"index": 2, "prompt": "e", "text": " f g", "tokens": 2},
        {"index": 3, "prompt": "a", "text": " b c d e f g", "tokens": 6},
    ]
    (strings := tmp_path / "p.jsonl").write_text('"b\\nc"\n')
    assert json.loads(run(path, "--prompts", strings).stdout)["prompt"] == "b\nc"
    assert run(path, "--prompts", "-", stdin="f\n").stdout.count("\n") == 1
    assert run(path, "--prompt", "-", "--stop", "f", stdin="b\nc").stdout == " d e \n"


@pytest.mark.parametrize(
    ("code", "words", "stdin", "message"),
    [
        (2, ["--prompt", "a", "--prompts", "-"], "", "--prompt and --prompts cannot be combined"),
        (2, ["--input", "x.npz", "--prompt", "a"], "", "--input and --prompt cannot be combined"),
        (1, ["--prompts", "none.txt"], "", "--prompts none.txt: there is no such file or folder"),
        (1, ["--prompts", "-"], "\n", "stdin has no prompt: write one per line"),
        (2, ["--prompt", "a", "--stop", ""], "", "each must be a string"),
        (2, ["--prompt", "a", "--top-p", "2"], "", "top_p is 2.0; it must be above 0"),
    ],
)
def test_mistakes(path: Path, code: int, words: list[str], stdin: str, message: str) -> None:
    done = run(path, *words, stdin=stdin)
    assert done.exit_code == code
    assert message in done.stderr


def test_files_that_hold_no_text(path: Path, tmp_path: Path) -> None:
    (file := tmp_path / "p.txt").write_bytes(b"a\n\xff")
    assert "p.txt is not UTF-8 at byte 2" in run(path, "--prompts", file).stderr
    (file := tmp_path / "p.jsonl").write_text("{}\n")
    done = run(path, "--prompts", file)
    assert done.exit_code == 3
    assert json.loads(done.stdout) == {"index": 0, "error": "the line is no JSON string"}


@pytest.mark.parametrize("depth", [1100, 5_000, 100_000])
def test_tools_that_are_nested_too_deeply(depth: int) -> None:
    """Neither this process nor that of the template ends, and both serve the next chat."""
    tool: Any = {}
    for _ in range(depth):
        tool = {"a": tool}
    template = ChatTemplate("{{ tools | tojson }}")
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="rejects the messages: they, or the tools, are nested"):
        template.render(messages, [tool])
    assert template.render(messages, [{"b": 1}]) == '[{"b": 1}]'
    while tool:
        tool = tool.pop("a")  # whose end would recurse, too
