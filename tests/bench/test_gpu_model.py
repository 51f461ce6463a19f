"""`moec bench --target cuda:sm_90a --model` against numbers worked out by hand."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from moec import __main__ as front
from moec.bench.gpu_model import LAUNCH, LAYERS, PUBLISHED, TOKENS, expected, mma_peak
from moec.target.cuda import TARGETS

H100, L40S = TARGETS["cuda:sm_90a"], TARGETS["cuda:sm_89"]


def test_one_token_waits_for_weights() -> None:
    """Two of three matrices of 8 experts: 50.3 MB at 75 % of 3.35 TB/s are 20.0 us."""
    kernels = {k.kernel: k for k in expected(LAYERS["qwen3-30b-a3b"], 1, H100)}
    assert kernels["up"].expected == pytest.approx(20.0e-6 + LAUNCH, rel=0.01)
    assert kernels["up"].bound == "bandwidth"
    assert kernels["route"].limit < 1e-8
    assert all(k.expected > k.limit for k in kernels.values())


def test_many_tokens_wait_for_tensor_cores() -> None:
    """4096 tokens, 2 of Mixtral's 8: 1.92 TFLOP up, by wgmma or mma.sync."""
    assert mma_peak(H100) == pytest.approx(350e12)
    assert mma_peak(L40S) == pytest.approx(0.6 * 362e12)
    flops = 2 * 2.0 * 4096 * 2 * 4096 * 14336
    for gpu, rate in ((H100, 989e12 / 2), (L40S, 0.6 * 362e12)):
        up, down = expected(LAYERS["mixtral-8x7b"], 4096, gpu)[2:4]
        assert up.expected == pytest.approx(flops / rate + LAUNCH)
        assert down.expected == pytest.approx(flops / 2 / rate + LAUNCH)
        assert up.bound == "tensor cores"


def test_published_times_as_shares_of_their_own_gpus_limit() -> None:
    shares = {(p.tokens, p.source): p.share for p in PUBLISHED}
    assert shares[1, "vllm#19049"] == pytest.approx(0.45, abs=0.01)
    assert shares[96, "vllm#19049"] == pytest.approx(0.82, abs=0.015)
    assert shares[1, "vllm#24700"] is None  # its GPU is not known


def test_the_command_prints_it_as_a_model() -> None:
    result = CliRunner().invoke(front.cli, ["bench", "--target", "cuda:sm_90a", "--model"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("A model of H100 SXM (cuda:sm_90a)")
    assert lines[0].endswith("nothing was measured.")
    rows = [line for line in lines if line.startswith("qwen3-30b-a3b") and "T =" not in line]
    rows = [row for row in rows if " after " not in row]
    assert [int(row[18:23]) for row in rows] == list(TOKENS)
    attention = next(n for n, line in enumerate(lines) if line.startswith("Attention with its"))
    assert sum("1 x 4096 after 0" in line for line in lines[attention:]) == 4
    assert any("45% of the limit: vLLM Triton bf16" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model"], "give --target cuda:sm_90a and --model together"),
        (["--target", "cuda:sm_80"], "give --target cuda:sm_90a and --model together"),
        (["x", "--target", "cuda:sm_80", "--model"], "without MODEL"),
        (
            ["--target", "cuda:sm_80,sm_89", "--model"],
            ("--model is about one GPU: name one of cuda:sm"),
        ),
        (["--target", "cuda:sm_1", "--model"], "unknown target 'cuda:sm_1'"),
        ([], "name a model or an artifact to time"),
    ],
)
def test_refusals(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(front.cli, ["bench", *arguments])
    assert result.exit_code == 1
    assert words in result.output
