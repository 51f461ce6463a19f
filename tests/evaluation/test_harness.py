"""moec's model of lm-evaluation-harness, where that package is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import moec
from moec.evaluation.subject import open_subject
from moec.evaluation.tasks import log_likelihood

pytest.importorskip("lm_eval")


def test_requests(compiled_tiny_moe: moec.CompiledModel, tmp_path: Path) -> None:
    from moec.evaluation.harness import HarnessModel

    compiled_tiny_moe.save(tmp_path / "tiny.moec")
    model, subject = HarnessModel(tmp_path / "tiny.moec"), open_subject(f"{tmp_path}/tiny.moec")
    pairs = [("import ", "os\n"), ("", "def f():")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    assert model.loglikelihood(requests) == [log_likelihood(subject, *pair) for pair in pairs]
    text = "def f(x):\n    return x\n"
    (rolling,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert rolling == pytest.approx(log_likelihood(subject, "", text)[0], abs=0.05)  # bf16
    options = {"until": ["\n"], "max_gen_toks": 20}
    (written,) = model.generate_until([SimpleNamespace(args=("def main(", options))])
    expected = moec.load(tmp_path / "tiny.moec").generate("def main(", max_new_tokens=20)
    assert expected.removeprefix("def main(").partition("\n")[0] == written
