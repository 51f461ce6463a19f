"""`moec serve` with several artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import moec
from tests.command_line import invoke
from tests.serving.running import (
    MODEL,
    PROMPT,
    TEXT,
    Running,
    continuation,
    process,
    serving,
)

TWIN = "twin"


@pytest.fixture
def running(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, twin=TWIN) as running:
        yield running


def test_the_field_chooses_the_model(running: Running, model: moec.LoadedModel) -> None:
    for name, chosen in (({}, MODEL), ({"model": MODEL}, MODEL), ({"model": TWIN}, TWIN)):
        before = [running.metric("generation_tokens_total", n) for n in (MODEL, TWIN)]
        status, answer, _ = running.send("/v1/completions", TEXT | {"max_tokens": 7} | name)
        assert (status, answer["model"]) == (200, chosen)
        after = [running.metric("generation_tokens_total", n) for n in (MODEL, TWIN)]
        assert after[chosen == TWIN] == before[chosen == TWIN] + 7
        assert after[chosen != TWIN] == before[chosen != TWIN]
    with pytest.raises(openai.NotFoundError, match="'x' is not served here; 'tiny', 'twin' are"):
        running.client.completions.create(prompt="a", model="x")


def test_what_is_listed(running: Running) -> None:
    models = [entry.id for entry in running.client.models.list().data]
    assert models == [MODEL, TWIN]
    assert running.send(f"/v1/models/{TWIN}")[1]["max_model_len"] == 256
    assert running.send("/v1/moec/stats")[1]["models"] == [MODEL, TWIN]
    stats = running.send(f"/v1/moec/stats?model={TWIN}")[1]
    assert (stats["model"], stats["context"]) == (TWIN, 256)
    assert running.send("/v1/moec/stats?model=x")[0] == 404
    fields = running.send("/openapi.json")[1]["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = fields["content"]["application/json"]["schema"]
    assert schema["properties"]["model"] == {"enum": [MODEL, TWIN]}
    assert running.send("/ready")[1] == {"ready": True}


def test_both_at_once(running: Running, model: moec.LoadedModel) -> None:
    def write(name: str) -> Any:
        options: Any = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
        return running.client.completions.create(model=name, **options).choices[0].text

    expected = continuation(model, PROMPT, 30)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, [MODEL, TWIN] * 8)) == {expected}


def test_an_engine_that_fails_leaves_the_other(running: Running) -> None:
    running.executor.fails = RuntimeError("the disk is gone")
    for _ in range(3):
        with pytest.raises(openai.InternalServerError, match="the disk is gone"):
            running.client.completions.create(prompt="a", model=MODEL)
    assert running.send("/health")[0] == 503
    assert running.send("/v1/completions", TEXT | {"model": TWIN})[0] == 200


def test_a_process(path: Path, tmp_path: Path) -> None:
    other = shutil.copy(path, tmp_path / "other.moec")
    with process(path, str(other)) as (child, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        with client:
            assert [entry.id for entry in client.models.list().data] == [MODEL, "other"]
            texts = [
                client.completions.create(prompt=PROMPT, model=name, max_tokens=5, temperature=0)
                for name in (MODEL, "other")
            ]
        assert texts[0].choices[0].text == texts[1].choices[0].text
        child.terminate()
        assert child.wait(30) == 0


def test_refusals(path: Path, tmp_path: Path) -> None:
    other = shutil.copy(path, tmp_path / "other.moec")
    for words, message in (
        ((path, path), f"{path} and {path} are both named tiny: rename one of the files"),
        ((path, other, "--name", "x"), "--name is for one artifact, and there are 2"),
        ((path, other, "--memory", "4GiB"), "--memory is for one artifact, and there are 2"),
    ):
        result = invoke("serve", *words)
        assert result.exit_code == 2
        assert message in result.stderr
