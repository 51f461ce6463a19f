"""Formats of few bits: their notation, the meaning of codes, and their rounding errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.ir.formats import integer
from moec.ir.formats.integer import E2M1_TWICE, dequantise, quantise, round_rows
from moec.ir.formats.notation import Format, Quantisation, parse, parse_parts

FORMATS = (
    "int8",
    "int8:32",
    "int8:asymmetric",
    "int4",
    "int4:32",
    "int4:64",
    "int4:128:asymmetric",
    "int6:64",
    "int5:32:asymmetric",
    "int3:32",
    "int3:64:asymmetric",
    "int2:32",
    "int2:64:asymmetric",
    "fp8",
    "fp8:64",
    "mxfp4",
    "mxfp4:rows16",
)
each_format = pytest.mark.parametrize("text", FORMATS)


def meaning(format: Format, weight: torch.Tensor) -> torch.Tensor:
    codes = quantise(format, weight)
    return dequantise(format.kind, codes.codes, codes.scales, codes.zeros)


@each_format
def test_what_is_spelled_is_what_is_meant(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int7", "'int7' is not a format; write int8, int6, int5, int4, int3 or int2"),
        ("", "'' is not a format"),
        ("int4:48", ":48 is neither a block size nor an option"),
        ("int4:32:64", ":64 is neither a block size nor an option, or is repeated"),
        ("int4:asymmetric:asymmetric", "is repeated"),
        ("fp8:asymmetric", "fp8 has no zero point: it takes no :asymmetric"),
        ("fp8:32:64", ":64 is neither a block size nor an option, or is repeated"),
        ("mxfp4:64", "mxfp4 is symmetric, in blocks of 32: it takes no :64"),
        ("mxfp4:asymmetric", "it takes no :asymmetric"),
        ("int8:rows16:rows16", ":rows16 is neither a block size nor an option, or is repeated"),
        ("int8:rows8", ":rows8 is neither a block size nor an option"),
        ("int9", "any of them with :rows16"),
    ],
)
def test_wrong_spellings_are_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert words in str(raised.value)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_to_nearest(text: str, dtype: torch.dtype) -> None:
    """No weight is farther off than half of the distance between its neighbours' codes.

    A symmetric range ends one code short of +amax, and a scale that was rounded to bf16 may end
    2^-9 of the range short: weights at the end may be off by more than half of a step.
    """
    format = parse(text)
    weight = (torch.randn(2, 12, 256) * 0.1).to(dtype)
    codes = quantise(format, weight)
    off = (dequantise(format.kind, codes.codes, codes.scales, codes.zeros) - weight.float()).abs()
    off = off.unflatten(-1, (codes.scales.shape[-1], -1))
    if format.kind == "mxfp4":
        step = torch.ldexp(torch.ones(codes.scales.shape), codes.scales.int() - 127)[..., None]
        assert (off <= step * 2.0).all()  # beyond 6 is 6: up to 8 there is a range of 2
        inside = off[weight.float().abs().unflatten(-1, off.shape[-2:]) <= 6 * step]
        assert (inside <= step.expand_as(off).max() * 1.0).all()
    elif format.kind == "fp8":
        # Half a step of three bits, or of the smallest magnitudes; the greatest may end 2^-9 short.
        scale, magnitude = codes.scales.float()[..., None], weight.float().abs()
        relative = (2.0**-4 + 2.0**-9) * magnitude.unflatten(-1, off.shape[-2:])
        assert (off <= torch.maximum(relative, scale * 2.0**-10)).all()
    else:
        step = codes.scales.float().abs()[..., None]
        ends = 1 + 2.0**-8 * 2**format.bits / 2
        assert (off <= step * ends).all()
        assert ((off <= step * 0.501).float().mean()) > 0.95
    bound = {
        "int8": 0.008,
        "int6": 0.03,
        "int5": 0.06,
        "int4": 0.12,
        "int3": 0.2,
        "int2": 0.6,
        "fp8": 0.03,
        "mxfp4": 0.13,
    }
    bound = bound[format.kind]
    assert off.norm() <= bound * weight.float().norm()


@each_format
def test_zeros_stay_zeros_and_small_weights_stay_small(text: str) -> None:
    format = parse(text)
    assert not meaning(format, torch.zeros(1, 2, 128)).any()
    tiny = torch.full((1, 2, 128), 1e-38)
    assert meaning(format, tiny).abs().max() <= 2e-38


def test_fp8_codes_are_sign_exponent_and_fraction() -> None:
    """OCP 8-bit Floating Point 1.0, section 5: e4m3, whose exponent has a bias of 7."""
    for code in range(127):
        exponent, fraction = code >> 3, code & 7
        value = fraction * 2.0**-9 if not exponent else (8 + fraction) * 2.0 ** (exponent - 10)
        codes = torch.tensor([[code, code + 128]], dtype=torch.uint8)
        scales = torch.tensor([[0.5]], dtype=torch.bfloat16)
        assert dequantise("fp8", codes, scales).tolist() == [[value / 2, -value / 2]]


def test_symmetric_codes_reach_both_ends() -> None:
    weight = torch.linspace(-1, 1, 128).expand(1, 2, 128)
    for text, levels in (("int4", 16), ("int8:asymmetric", 256)):
        codes = quantise(parse(text), weight).codes
        assert int(codes.min()) == 0
        assert int(codes.max()) >= levels - 2  # a scale in bf16 may be 2^-9 too large


def test_weights_that_were_mxfp4_are_found_again() -> None:
    """GPT-OSS is stored so, and read in as bf16: every block of such numbers keeps its values,
    whatever its greatest one is."""
    codes = torch.randint(0, 16, (2, 8, 128), dtype=torch.uint8)
    codes[0, 0, :32], codes[0, 1, :32], codes[0, 2, :32] = 1, 9, 0
    scales = torch.randint(100, 140, (2, 8, 4), dtype=torch.uint8)
    weight = dequantise("mxfp4", codes, scales)
    assert torch.equal(meaning(parse("mxfp4"), weight.bfloat16()), weight)


def test_mxfp4_takes_the_nearest_magnitude_and_of_two_the_even_code() -> None:
    magnitudes = torch.tensor(E2M1_TWICE) / 2
    values = torch.arange(0, 6.5, 1 / 64)
    weight = torch.zeros(1, len(values), 32)
    weight[0, :, 0], weight[0, :, 1] = values, 6  # the six makes the block's exponent 0
    weight[0, -1, 0] = -2.5
    codes = quantise(parse("mxfp4"), weight).codes[0, :, 0].long()
    assert codes[-1] == 8 + 4
    codes, values = codes[:-1], values[:-1]
    distances = (values[:, None] - magnitudes).abs()
    nearest = distances.amin(1)
    assert torch.equal(distances.gather(1, codes[:, None])[:, 0], nearest)
    ties = (distances == nearest[:, None]).sum(1) == 2
    assert ties.sum() == 7
    assert not (codes[ties] % 2).any()


def test_the_values_of_the_same_codes_are_computed_once() -> None:
    one, two = (quantise(parse("int4:32"), torch.randn(2, 8, 64)) for _ in range(2))
    experts = [(q.codes[e], q.scales[e]) for q in (one, two) for e in (0, 1)]
    expected = [dequantise("int4", *parts) for parts in experts]
    with integer.dequantised_once():
        first, again = ([dequantise("int4", *parts) for parts in experts] for _ in range(2))
    assert all(map(torch.equal, first, expected))
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_a_block_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="blocks of 64 do not divide 96"):
        quantise(parse("int4:64"), torch.zeros(1, 1, 96))


@given(
    st.lists(st.floats(width=32), min_size=8, max_size=8),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(8, 127), (16, 32639)]),
)
def test_rows_are_rounded_block_by_block(
    numbers: list[float], blocks: int, levels: tuple[int, int]
) -> None:
    """Within half of a 127th (a 32639th) of the block's greatest, or NaN as a block. The scale,
    its inverse and two products round by 2^-24 each, which in 16 bits is 0.4 % of such a half."""
    x, (bits, most) = torch.tensor([numbers]), levels
    result = round_rows(x, blocks, bits).view(blocks, -1)
    for actual, block in zip(result, x.view(blocks, -1), strict=True):
        if not block.isfinite().all():
            assert actual.isnan().all()
            continue
        greatest = block.abs().max()
        room = greatest / most * (0.5 + most * 2.0**-22) if greatest > 1e-30 else greatest
        assert ((actual - block).abs() <= room + 1e-38).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_rows_have_the_derivative_of_rows(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    factors = torch.randn(3, 8).to(dtype).float()
    result = round_rows(x, 2)
    assert torch.equal(result, round_rows(x.detach(), 2))
    assert torch.equal(torch.autograd.grad((result * factors).sum(), x)[0].float(), factors)


def test_parts_of_a_model_are_spelled_by_name() -> None:
    result = parse_parts("int4:64, linears=int8,head=int8:32")
    assert result == Quantisation(parse("int4:64"), parse("int8"), parse("int8:32"))
    assert str(result) == "experts=int4:64,linears=int8,head=int8:32"
    assert parse_parts("head=int8") == Quantisation(head=parse("int8"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8,int4", "experts is repeated"),
        ("int8,tail=int4", "'tail' is not one of experts, linears, head"),
        ("int8,head=int7", "'int7' is not a format"),
        ("int8,", "'' is not a format"),
    ],
)
def test_parts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_parts(text)
