"""The numbers behind a path; docs/noise.md tells of the long tests.

All are fixed functions of fixed keys, so what passes once passes always. Bounds are in standard
errors: `count` normal numbers stay within far(count) of them with probability 0.9999.
"""

import math

import pytest
import torch

from kakusan.core.hashing import normals, words
from kakusan.core.noise import mix

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])


def far(count):
    return math.sqrt(2) * torch.erfinv(torch.tensor(1 - 1e-4 / count).double()).item()


def signed(values):
    """64-bit numbers as two rows of int32 words, low words first: keys to broadcast with lanes."""
    x = torch.tensor([v - (1 << 64) if v >> 63 else v for v in values])
    low = (x << 32) >> 32
    return torch.stack([low, x >> 32]).int()[:, :, None]


def keys(seeds=(0,), levels=(0,), indices=(0,)):
    return signed([mix(s, n, i) for s in seeds for n in levels for i in indices])


def lanes(n, first=0):
    return torch.arange(first, first + n, dtype=torch.int32)


@pytest.fixture(scope="module")
def many():
    """Numbers (z, y) of 100 neighbouring keys and 50,000 lanes, in both precisions."""
    key = keys(indices=range(100))
    return {t: normals(lanes(50_000), key, t) for t in (torch.float32, torch.float64)}


def moment(p):
    """Of a standard normal number: (p - 1)!! for even p."""
    return 0 if p % 2 else math.prod(range(1, p, 2))


# --- the words


def test_words_are_the_published_mixer_twice():
    def mixer(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def turned(x):
        return x << 16 & 0xFFFF0000 | x >> 16

    lane = torch.tensor([0, 1, 77, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    for value in (0, 1, 0xFFFFFFFF, 0x80000000_7FFFFFFF, *(mix(s) for s in range(20))):
        a = [mixer((n + value) % 2**32) for n in lane.tolist()]
        b = [mixer(x ^ value >> 32) for x in a]
        u, v = words(lane, signed([value])[:, 0, 0])
        assert [x % 2**32 for x in u.tolist()] == [
            x ^ turned(y) for x, y in zip(a, b, strict=True)
        ]
        assert [x % 2**32 for x in v.tolist()] == b


def test_the_first_words_of_a_known_key():
    """Published streams: a change here changes every path that was ever recorded by its seed."""
    u, v = words(lanes(3), keys(seeds=[7], indices=[3])[:, 0])
    assert u.tolist() == [-1697538696, -1003066227, 695051679]
    assert v.tolist() == [1844338452, 1042776150, -995902173]


@FLOATS
def test_each_number_is_a_function_of_key_and_lane_alone(dtype):
    key, lane = keys(indices=range(5)), lanes(1003)
    z, y = normals(lane, key, dtype)
    g = torch.Generator().manual_seed(0)
    for pick in (torch.randperm(1003, generator=g), lanes(7, 500).long(), torch.tensor([1002])):
        for k in (0, 4):
            part = normals(lane[pick], key[:, k, 0], dtype)
            assert torch.equal(part[0], z[k, pick]) and torch.equal(part[1], y[k, pick])
    square = normals(lane[:1000].reshape(10, 100), key[:, 2], dtype)
    assert torch.equal(square[0].flatten(), z[2, :1000])


def test_keys_differ():
    found = {mix(s, n, i) for s in range(40) for n in range(40) for i in range(100)}
    assert len(found) == 160_000
    low, high = ([k >> shift & 0xFFFFFFFF for k in found] for shift in (0, 32))
    expected = 160_000**2 / 2 / 2**32  # birthdays of 32-bit words
    for half in (low, high):
        assert abs(len(half) - len(set(half)) - expected) < far(2) * expected**0.5 + 1


def test_second_words_of_a_key_never_repeat_and_first_words_repeat_by_chance():
    n = 1_000_000
    u, v = words(lanes(n), keys(seeds=[1])[:, 0])
    assert len(v.unique()) == n
    expected = n**2 / 2 / 2**32
    assert abs(n - len(u.unique()) - expected) < far(1) * expected**0.5


def bits(x):
    """The bits of int32 words, along a new first axis."""
    return torch.stack([x >> k & 1 for k in range(32)])


def test_each_bit_is_one_half_of_the_time_and_bits_are_independent():
    u, v = words(lanes(1000), keys(indices=range(400)))
    ones = torch.cat([bits(u.flatten()), bits(v.flatten())]).float() * 2 - 1
    n = ones.shape[1]
    assert ones.mean(1).abs().max() < far(64) / n**0.5
    correlation = (ones @ ones.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < far(64 * 63 / 2) / n**0.5


@pytest.mark.parametrize("part", ["lane", "k0", "k1"])
def test_each_bit_of_the_input_flips_each_bit_of_the_output_half_of_the_time(part):
    n = 100_000
    g = torch.Generator().manual_seed(1)
    lane, k0, k1 = torch.randint(-(2**31), 2**31, (3, n), generator=g).int()
    lane = lane & 0xFFFFF  # lanes are small in use
    before = words(lane, torch.stack([k0, k1]))
    worst = 0.0
    for k in range(32):
        bit = torch.tensor(1 << k if k < 31 else -(1 << 31), dtype=torch.int32)
        flipped = {"lane": lane, "k0": k0, "k1": k1}
        flipped[part] = flipped[part] ^ bit
        after = words(flipped["lane"], torch.stack([flipped["k0"], flipped["k1"]]))
        for x, y in zip(before, after, strict=True):
            share = bits(x ^ y).sum(1) / n
            worst = max(worst, (share - 0.5).abs().max().item())
    assert worst < far(32 * 64) * 0.5 / n**0.5


# --- the normal numbers


@FLOATS
def test_moments_to_order_eight(many, dtype):
    z = torch.cat(many[dtype]).flatten().double()
    power, n = torch.ones_like(z), len(z)
    assert n == 10_000_000
    for p in range(1, 9):
        power *= z
        error = math.sqrt((moment(2 * p) - moment(p) ** 2) / n)
        assert abs(power.mean() - moment(p)) < 4 * error, p


@FLOATS
def test_the_law_is_normal(many, dtype):
    """Kolmogorov and Smirnov: sqrt(n) D is beyond 2.28 once in 16,000 times."""
    z = torch.cat(many[dtype]).flatten().sort().values.double()
    p, grid = torch.special.ndtr(z), torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
    distance = torch.maximum((grid[1:] - p).max(), (p - grid[:-1]).max())
    assert distance * len(z) ** 0.5 < 2.28


@FLOATS
def test_the_two_numbers_of_a_lane_are_independent(many, dtype):
    z, y = (x.flatten().double() for x in many[dtype])
    for p in range(1, 5):
        for q in range(1, 5):
            mean = moment(p) * moment(q)
            error = math.sqrt((moment(2 * p) * moment(2 * q) - mean**2) / len(z))
            assert abs((z**p * y**q).mean() - mean) < far(16) * error, (p, q)


@FLOATS
def test_a_pair_lies_on_its_circle(dtype):
    """z² + y² = -2 log of 31 bits of the first word: whatever makes the angle is exact."""
    lane, key = lanes(100_000), keys(indices=range(10))
    z, y = (x.double() for x in normals(lane, key, dtype))
    first = (words(lane, key)[0].long() & 0xFFFFFFFF) >> 1
    squared = -2 * ((first.double() + 1) * 2.0**-31).log()
    error = (z**2 + y**2 - squared).abs() / (1 + squared)
    assert error.max() < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]


@FLOATS
def test_tails(dtype):
    """Counts beyond 4 and 5 among 4e7 numbers; none can be beyond sqrt(62 log 2)."""
    counts, n, largest = torch.zeros(2), 0, 0.0
    for i in range(20):
        key = keys(seeds=[2], indices=range(10 * i, 10 * i + 10))
        for x in normals(lanes(100_000), key, dtype):
            x = x.abs()
            counts += torch.stack([(x > 4).sum(), (x > 5).sum()])
            n, largest = n + x.numel(), max(largest, x.max().item())
    expected = n * torch.special.erfc(torch.tensor([4.0, 5.0]) / math.sqrt(2))
    assert n == 40_000_000 and largest < math.sqrt(62 * math.log(2))
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def related(x, y, count):
    """Whether numbers or their squares correlate: the powers 1 and 2 of two arrays."""
    n = x.numel()
    for p, q in ((1, 1), (1, 2), (2, 1), (2, 2)):
        scale = math.sqrt((2 if p == 2 else 1) * (2 if q == 2 else 1))
        a, b = x**p - moment(p), y**q - moment(q)
        if abs((a * b).sum() / n) > far(4 * count) * scale / n**0.5:
            return True
    return False


def test_neighbouring_lanes_are_uncorrelated():
    pair = normals(lanes(20_000), keys(seeds=[3], indices=range(50)), torch.float64)
    lags = (1, 2, 3, 4, 8, 16, 64, 256, 1000, 4096)
    for lag in lags:
        for x in pair:
            for y in pair:
                assert not related(x[:, lag:], y[:, :-lag], 4 * len(lags)), lag


@pytest.mark.parametrize("change", ["seeds", "levels", "indices"])
def test_neighbouring_keys_are_uncorrelated(change):
    pair = normals(lanes(1000), keys(**{change: range(1025)}), torch.float64)
    lags = (1, 2, 3, 4, 8, 16, 64, 256, 1000)
    for lag in lags:
        for x in pair:
            for y in pair:
                assert not related(x[lag:], y[:-lag], 4 * len(lags)), lag
    z = pair[0]
    for along in (0, 1):  # means of a key over lanes, and of a lane over keys
        n, count = z.shape[along], z.shape[1 - along]
        for p, variance in ((1, 1), (2, 2)):
            mean = ((z**p).mean(along) - moment(p)) * (n / variance) ** 0.5
            assert abs(mean.var() - 1) < 4 * ((2 + 12 / n * (p == 2)) / count) ** 0.5, (along, p)


def test_places_with_the_same_low_word_are_uncorrelated():
    """Their lanes share the first word of two before it is mixed in: a xor b alone gave 0.11."""
    g = torch.Generator().manual_seed(2)
    k0, k1, other = torch.randint(-(2**31), 2**31, (3, 200, 1), generator=g).int()
    pair = normals(lanes(10_000), torch.stack([k0, k1]), torch.float64)
    # a low word that differs by 7 moves the same words by 7 lanes
    moved = normals(lanes(10_000, 7), torch.stack([k0 - 7, other]), torch.float64)
    for x in pair:
        for y in moved:
            assert not related(x, y, 4)
