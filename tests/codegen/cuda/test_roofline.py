"""The roofline model against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.codegen.cuda.roofline import LayerShape, layer_seconds, layer_work
from moec.target.cuda import TARGETS

QWEN = LayerShape(128, 8, 2048, 768)
H100 = TARGETS["cuda:sm_90a"]
A100_40 = replace(TARGETS["cuda:sm_80"], bandwidth=1.555e12)


def test_weights_of_a_layer() -> None:
    assert QWEN.expert_bytes == 9_437_184
    assert QWEN.experts * QWEN.expert_bytes == pytest.approx(1.208e9, rel=1e-3)
    assert QWEN.active(1) == pytest.approx(8)
    assert QWEN.active(0) == 0
    assert QWEN.active(96) == pytest.approx(127.74, abs=0.01)


def test_few_tokens_are_bound_by_the_weights_of_their_experts() -> None:
    """75.5 MB at 3.35 TB/s are 22.5 µs; the rest of the layer is small beside that."""
    assert layer_seconds(QWEN, 1, H100) == pytest.approx(22.5e-6, rel=0.01)
    assert layer_seconds(QWEN, 96, A100_40) == pytest.approx(777e-6, rel=0.02)


def test_many_rows_are_bound_by_tensor_cores() -> None:
    """8192 tokens are 512 rows an expert: 618 GFLOP at 989 TFLOP/s are 625 µs."""
    products = [work for work in layer_work(QWEN, 8192) if work.kernel in ("up", "down")]
    assert sum(work.flops for work in products) == 6 * 8192 * 8 * 2048 * 768
    assert sum(work.flops for work in products) / H100.bf16_peak == pytest.approx(625e-6, rel=0.01)
    assert products[0].seconds(H100) == products[0].flops / H100.bf16_peak


def test_no_tokens_take_no_time_to_speak_of() -> None:
    assert layer_seconds(QWEN, 0, H100) < 1e-9
