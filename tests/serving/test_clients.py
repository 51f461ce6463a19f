"""Clients that are not Python: OpenAI's for JavaScript, and requests made from the document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moec
from tests.serving.running import MODEL, PROMPT, Running, continuation

ROOT = Path(__file__).parents[2]
MODULES = Path(os.environ.get("NODE_MODULES", ROOT / ".venv" / "node" / "node_modules"))
SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"


@pytest.mark.skipif(
    not (MODULES / "openai").is_dir() or not shutil.which("node"),
    reason="OpenAI's client for JavaScript is not installed: make openai-js",
)
def test_the_client_for_javascript(shared: Running, model: moec.LoadedModel) -> None:
    messages = [{"role": "user", "content": "Open a file"}]
    answers = {
        "model": MODEL,
        "prompt": PROMPT,
        "text": continuation(model, PROMPT, 20),
        "messages": messages,
        "chat": continuation(model, "# user: Open a file\ndef ", 20),
    }
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("client.mjs")), f"http://127.0.0.1:{shared.port}/v1"],
        input=json.dumps(answers), capture_output=True, text=True, timeout=120,
        env={**os.environ, "NODE_MODULES": str(MODULES)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_no_request_of_the_document_breaks_the_server(shared: Running, tmp_path: Path) -> None:
    """The long form, by hand, has 600 examples of each operation."""
    done = subprocess.run(
        [
            str(SCHEMATHESIS), "run", f"http://127.0.0.1:{shared.port}/openapi.json",
            "--checks", "not_a_server_error,status_code_conformance", "--max-examples", "8",
            "--seed", "1", "--phases", "coverage,fuzzing", "--request-timeout", "60",
        ],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "11 passed" in done.stdout
    assert shared.send("/health")[0] == 200
