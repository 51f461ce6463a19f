"""`moec bench --serve`: a server under load."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import moec
from moec.inspect.bench.clients import Answers, AnswerTimes, ServerLoad, measure
from moec.inspect.bench.served import ServedResult, plot, served
from moec.serving.access import Access
from tests.command_line import invoke
from tests.serving.running import Running, serving

SMALL = ["--prompt-tokens", "20", "--new-tokens", "5", "--requests", "6"]


def bench(*words: str) -> tuple[int, str, str]:
    result = invoke("bench", "--serve", *words, *SMALL)
    return result.exit_code, result.stdout, result.stderr


def test_a_server_under_load(shared: Running) -> None:
    before = shared.metric("generation_tokens_total")
    code, output, error = bench(
        f"http://127.0.0.1:{shared.port}", "--rate", "50", "--clients", "1,3", "--json"
    )
    assert code == 0, error
    lines = json.loads(output)["lines"]
    assert [(line["load"]["rate"], line["load"]["clients"]) for line in lines] == [
        (50, 0), (0, 1), (0, 3),
    ]  # fmt: skip
    assert shared.metric("generation_tokens_total") - before == 5 * (3 * 6 + 2)  # two come first
    for line in lines:
        assert (line["answered"], line["failed"]) == (6, 0)
        assert line["tokens_per_second"] == pytest.approx(5 * line["rate"])
        assert 0 < line["first"][0] < line["end"][0] <= line["end"][1] <= line["end"][2]


def test_an_artifact_under_load(path: Path) -> None:
    code, output, error = bench(str(path), "--clients", "2", "--threads", "1", "-q")
    assert code == 0, error
    assert output.startswith("tiny.moec on ")
    assert "6 requests of 20 + 5 tokens for each load" in output
    assert output.splitlines()[-1].split()[:3] == ["2", "clients", "6"]


def test_failures_are_counted(model: moec.LoadedModel) -> None:
    with serving(model, slots=1, queue=0) as running:
        url = f"http://127.0.0.1:{running.port}/v1"
        answers = measure(url, ServerLoad(20, 20, 40, clients=4))
        line = served(ServerLoad(20, 20, 40, clients=4), answers)
        assert line.answered + line.failed == 20
        assert line.failed > 0
        assert "status 429" in line.error
        result = str(ServedResult("x", "y", (line,)))
        assert f"4 clients: {line.failed} failed: status 429" in result


class Closing(BaseHTTPRequestHandler):
    """Like llama.cpp's server, promises to keep a connection and closes it after a stream."""

    protocol_version = "HTTP/1.1"
    prompts: list[list[int]]

    def do_GET(self) -> None:
        self.answer("application/json", json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.prompts.append(json.loads(self.rfile.read(length))["prompt"])
        events = [{"choices": [{"text": "a"}]}, {"usage": {"completion_tokens": 5}}]
        self.answer("text/event-stream", "".join(f"data: {json.dumps(e)}\n\n" for e in events))
        self.close_connection = True

    def answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_closes_connections_and_knows_earlier_prompts() -> None:
    Closing.prompts = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Closing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        code, output, error = bench(url, "--clients", "1,2", "--json")
        server.shutdown()
    assert code == 0, error
    assert [(line["answered"], line["failed"]) for line in json.loads(output)["lines"]] == [
        (6, 0), (6, 0),
    ]  # fmt: skip
    assert len(set(map(tuple, Closing.prompts))) == len(Closing.prompts) == 2 + 6 + 6


def test_percentiles_and_rates() -> None:
    times = tuple(AnswerTimes((n / 10, n / 10 + 0.02), n / 10 + 0.05, 7) for n in range(1, 101))
    line = served(ServerLoad(100, 1, 7, rate=4.0), Answers(times, (), 20.0))
    assert line.rate == 5
    assert line.tokens_per_second == 35
    assert line.first == pytest.approx((5.05, 9.505, 9.901))
    assert line.between == pytest.approx((0.02, 0.02, 0.02))
    assert line.load.name == "4/s"
    empty = served(ServerLoad(1, 1, 1, clients=1), Answers((), ("no",), 1.0))
    assert (empty.first, empty.error) == ((), "no")


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times = (AnswerTimes((0.1, 0.2), 0.3, 2),)
    lines = tuple(served(ServerLoad(1, 1, 2, clients=n), Answers(times, (), 1.0)) for n in (1, 4))
    plot(ServedResult("x", "y", lines), tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("expected", "words", "sentence"),
    [
        (1, ["http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 is no server with OpenAI's"),
        (1, ["none.moec"], "none.moec"),
        (2, ["x.moec", "--clients", "1,a"], "--clients 1,a: give numbers above 0, such as 1,4,16"),
        (2, ["x.moec", "--rate", "0"], "--rate 0: give numbers above 0"),
        (2, ["x.moec", "y.moec"], "--serve is about a server: leave MODEL_OR_ARTIFACT"),
    ],
)
def test_mistakes(expected: int, words: list[str], sentence: str) -> None:
    code, _, error = bench(*words, "-q")
    assert code == expected
    assert sentence in error
    assert error.count("\n") == 1


def test_a_key_is_sent(model: moec.LoadedModel) -> None:
    with serving(model, access=Access(key="secret")) as running:
        url = f"http://127.0.0.1:{running.port}"
        assert f"{url}/v1 needs a key: give --api-key" in bench(url, "-q")[2]
        assert bench(url, "-q", "--api-key", "secret", "--clients", "1")[0] == 0
