"""The container file of docs/install.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from moec.commands.serving.serve import command

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```dockerfile\n(.*?)```", text, flags=re.DOTALL)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in block.splitlines())]


def test_it_starts_a_server_that_reads_its_options() -> None:
    (entry,) = (json.loads(rest) for word, rest in instructions() if word == "ENTRYPOINT")
    assert entry[:2] == ["moec", "serve"]
    context = command.make_context("moec serve", entry[2:], resilient_parsing=True)
    (port,) = (int(rest) for word, rest in instructions() if word == "EXPOSE")
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", port)
    copied = {rest.split()[0] for word, rest in instructions() if word == "COPY"}
    assert copied == {"moec-*.whl", entry[2]}


def test_nothing_but_the_installation_runs_as_root() -> None:
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert words.index("USER") < words.index("ENTRYPOINT")
