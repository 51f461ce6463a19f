"""The format of ternary weights: its dictionary, and the exact round trip of codes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.formats import ternary
from moec.ir.formats.ternary import (
    Encoded,
    codes_of,
    decode,
    encode,
    grid_of,
    pack_starts,
    unpack_starts,
    values,
)
from moec.ir.formats.ternary_code import (
    CODEWORDS,
    MOST_PAIRS,
    PAIRS,
    ROOT,
    ZEROS,
    dictionary,
    masks,
    signs,
)


def sequence(word: int) -> tuple[int, ...]:
    """The weights of a codeword, read off its two words."""
    first, second = (int(w) for w in dictionary().entries[word])
    assert first & 15 == second & 15
    weights = [w >> 4 + 2 * i & 3 for w in (first, second) for i in range(14)]
    assert not any(weights[2 * (first & 15) :])
    return tuple(weights[: 2 * (first & 15)])


def source(rows: int, width: int, zeros: float, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rest = (1 - zeros) / 2
    return torch.from_numpy(rng.choice(3, (rows, width), p=[zeros, rest, rest]).astype(np.uint8))


def test_the_dictionary_is_the_likeliest_sequences_in_order():
    encoded = dictionary()
    sequences = [sequence(word) for word in range(CODEWORDS)]
    assert len(set(sequences)) == CODEWORDS
    assert {len(s) for s in sequences} == {2 * n for n in range(1, MOST_PAIRS + 1)}
    rest = (1 - ZEROS) / 2
    for word in range(0, CODEWORDS, 97):
        zeros = sequences[word].count(0)
        likelihood = ZEROS**zeros * rest ** (len(sequences[word]) - zeros)
        assert encoded.likelihoods[word] == pytest.approx(likelihood)
    assert (encoded.likelihoods[:-1] >= encoded.likelihoods[1:]).all()
    # None is left out that is likelier than the last: each child that has no codeword.
    positions = {s: word for word, s in enumerate(sequences)}
    for s in sequences[::31]:
        assert len(s) == 2 or s[:-2] in positions
        for pair in PAIRS:
            if len(s) < 2 * MOST_PAIRS and (*s, *pair) not in positions:
                zeros = (*s, *pair).count(0)
                missing = ZEROS**zeros * rest ** (len(s) + 2 - zeros)
                assert missing <= encoded.likelihoods[-1] * (1 + 1e-9)
    assert (encoded.children[ROOT] >= 0).all()


def test_the_masks_of_a_kernel_are_the_entries():
    result = masks(dictionary().entries)
    for word in (0, 13, 500, 40000, CODEWORDS - 1):
        weights = sequence(word)
        assert int(result[word]) >> 60 == len(weights) // 2
        for i in range(28):
            code = weights[i] if i < len(weights) else 0
            assert int(result[word]) >> i & 1 == (code == 1)
            assert int(result[word]) >> 32 + i & 1 == (code == 2)


def test_the_signs_of_a_kernel_are_the_entries():
    result = signs(dictionary().entries)
    for word in (0, 13, 500, 40000, CODEWORDS - 1):
        weights = sequence(word)
        assert result[word, -1] == len(weights) // 2
        expected = [{0: 0, 1: -1, 2: 1}[code] for code in weights]
        assert result[word, :-1].tolist() == expected + [0] * (31 - len(weights))


@given(
    st.one_of(st.integers(0, 5), st.just(70)),
    st.one_of(st.integers(0, 130), st.just(3000)),
    st.sampled_from([0.0, 0.3, 0.885, 0.99, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_codes_come_back(rows, width, zeros, seed):
    codes = source(rows, width, zeros, seed)
    encoded = encode(codes)
    assert torch.equal(decode(encoded, rows, width), codes)
    for row, (start, stop) in enumerate(pairwise(unpack_starts(encoded.starts, rows).tolist())):
        words = (encoded.stream[start:stop].int() & 0xFFFF).tolist()
        read = [weight for word in words for weight in sequence(word)]
        assert read == codes[row].tolist() + [0] * (width % 2)
        for a, b in pairwise(words):  # each match is the longest
            following = 3 * sequence(b)[0] + sequence(b)[1]
            assert dictionary().children[a, following] < 0


@pytest.mark.parametrize("width", [768, 4096])
def test_88_percent_zeros_are_compressed_20_times(width):
    """Against bf16, with row starts and two bf16 numbers a row; the bound is 25.4 times."""
    codes = source(1024, width, ZEROS, 1)
    encoded = encode(codes)
    assert 20 < 2 * codes.numel() / (encoded.nbytes + 4 * len(codes)) < 25.4


def test_a_stream_that_does_not_fill_its_rows_is_refused():
    encoded = encode(source(35, 40, 0.885, 2))
    starts = unpack_starts(encoded.starts, 35)
    starts[34] -= 1
    with pytest.raises(ValueError, match="row 33 of the stream does not hold 40 weights"):
        decode(Encoded(encoded.stream, pack_starts(starts)), 35, 40)
    with pytest.raises(ValueError, match="row 0 of the stream does not hold 38 weights"):
        decode(encoded, 35, 38)
    with pytest.raises(ValueError, match=r"rows of \d+ codewords are not \d+"):
        decode(Encoded(encoded.stream[:-1], encoded.starts), 35, 40)


@pytest.mark.parametrize(("row", "byte"), [(1, 0), (0, 4 + 31), (1, 4 + 3)])
def test_starts_that_do_not_follow_each_other_are_refused(row, byte):
    """A wrong start, a wrong count, one behind the last row."""
    encoded = encode(source(35, 40, 0.885, 2))
    encoded.starts[row, byte] += 1
    with pytest.raises(ValueError, match="the starts of rows do not follow each other"):
        decode(encoded, 35, 40)
    with pytest.raises(ValueError, match="are not those of 65 rows"):
        decode(encoded, 65, 40)


def test_other_codes_are_refused():
    with pytest.raises(ValueError, match="of 0, 1 and 2"):
        encode(torch.full((1, 2), 3, dtype=torch.uint8))


def test_weights_beyond_half_of_a_limit_take_it():
    weight = torch.tensor([[-1.0, -0.51, -0.5, 0.0, 1.0, 1.01, 2.0], [1, 2, 3, 4, 5, 6, 8]])
    result = grid_of(weight)
    assert result.tolist() == [[-1, 2], [0, 8]]
    codes = codes_of(weight, result)
    assert codes.tolist() == [[1, 1, 0, 0, 0, 2, 2], [0, 0, 0, 0, 2, 2, 2]]
    assert values(codes, result)[0].tolist() == [-1, -1, 0, 0, 0, 2, 2]


def test_numbers_fitted_to_codes_lose_less_and_none_nearby_loses_less():
    """Steps of 2 % are more than bf16 rounds."""
    torch.manual_seed(0)
    weight, x = torch.randn(2, 6, 24), torch.randn(2, 50, 24) * torch.linspace(0.2, 2, 24)
    hessian, grid = x.mT @ x, ternary.grid_of(weight)
    codes = ternary.codes_of(weight, grid)

    def lost(numbers: torch.Tensor) -> torch.Tensor:
        off = ternary.values(codes, numbers) - weight
        return ((off @ hessian) * off).sum(-1)

    fitted = ternary.refit(weight, codes, grid, hessian)
    assert (lost(fitted) < lost(grid)).all()
    for position in range(2):
        for factor in (0.98, 1.02):
            other = fitted.clone()
            other[..., position] *= factor
            assert (lost(other) > lost(fitted)).all()


def test_numbers_of_which_nothing_tells_stay():
    weight = torch.randn(3, 8).abs()
    grid = ternary.grid_of(weight)
    codes = ternary.codes_of(weight, grid)
    assert torch.equal(ternary.refit(weight, codes, grid, torch.zeros(8, 8)), grid)
    fitted = ternary.refit(weight, torch.zeros_like(codes), grid, torch.eye(8))
    assert torch.equal(fitted[:, 0], grid[:, 0])
