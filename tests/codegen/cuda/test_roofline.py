"""The roofline model against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.codegen.cuda.roofline import (
    AttentionShape,
    LayerShape,
    attention_work,
    layer_seconds,
    layer_work,
)
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


def test_weights_are_read_again_for_each_group_of_rows() -> None:
    """4096 tokens of Mixtral are 1024 rows an expert: 8 tiles, of which 7 are not the first, in
    groups of 8; 16 tokens are one tile."""
    mixtral = LayerShape(8, 2, 4096, 14336)
    for tokens, reads in ((16, 1), (4096, 1 + 7 / 8), (8192, 1 + 15 / 8)):
        up = next(work for work in layer_work(mixtral, tokens) if work.kernel == "up")
        weights = 2 * 4096 * 14336 * 2 * mixtral.active(tokens)
        rows = 2 * tokens * (4096 / 2 + 14336) * 2 + 2 * tokens * 4
        assert up.bytes == pytest.approx(weights * reads + rows, rel=1e-6)


def test_a_token_waits_for_its_keys_and_values() -> None:
    """16384 keys and values of 4 heads of 128 features in 16 bits: 33.6 MB."""
    heads = AttentionShape(2048, 32, 4, 128)
    qkv, append, attention, output = attention_work(heads, 1, 1, 16384)
    assert attention.bytes == pytest.approx(33.6e6, rel=0.01)
    assert attention.seconds(H100) == pytest.approx(10.0e-6, rel=0.01)
    assert attention.launches == 2  # of parts of the keys, and of their sum
    assert attention_work(heads, 1, 1, 100)[2].launches == 1
    assert qkv.bytes == pytest.approx(2 * 2048 * 5120, rel=0.01)
    assert output.bytes == pytest.approx(2 * 2048 * 4096, rel=0.01)
    assert append.bytes == 2 * 512 * 2 * 2  # read, then written


def test_a_prompt_waits_for_tensor_cores() -> None:
    """4096 queries of 32 heads meet 2048.5 keys each: two products of 128 features."""
    attention = attention_work(AttentionShape(2048, 32, 4, 128), 1, 4096, 0)[2]
    assert attention.flops == pytest.approx(2 * 2 * 4096 * 2048.5 * 32 * 128)
    assert attention.seconds(H100) == attention.flops / H100.bf16_peak


def test_a_product_of_few_tiles_is_two_launches() -> None:
    """64 rows by 2048 columns are 16 tiles of 132 SMs; 4096 rows are 512."""
    heads = AttentionShape(2048, 32, 4, 128)
    launches = [attention_work(heads, 1, new, 0)[3].launches for new in (1, 64, 4096)]
    assert launches == [1, 2, 1]


def test_no_tokens_take_no_time_to_speak_of() -> None:
    assert layer_seconds(QWEN, 0, H100) < 1e-9
