import pytest
import torch

from kakusan import Fresh, Keyed, Recorded
from kakusan.core.noise import mix

LIKE = torch.empty(0, dtype=torch.float64)


def test_keyed_numbers_depend_on_seed_stream_sample_and_step_alone():
    whole = Keyed(1, stream=2).normal(5, (200, 3), LIKE)
    for first, n in ((0, 1), (63, 2), (64, 64), (10, 150)):
        part = Keyed(1, first, stream=2).normal(5, (n, 3), LIKE)
        assert torch.equal(part, whole[first : first + n]), (first, n)
    for other in (Keyed(2, stream=2), Keyed(1, stream=3)):
        assert not torch.equal(other.normal(5, (200, 3), LIKE), whole)
    assert not torch.equal(Keyed(1, stream=2).normal(6, (200, 3), LIKE), whole)


def test_keyed_numbers_are_standard_normal_across_keys():
    z = torch.cat(
        [Keyed(s).normal(k, (64, 4), LIKE).flatten() for s in range(20) for k in range(20)]
    )
    n = len(z)
    for power, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - value) < 4 * (variance / n) ** 0.5, power
    blocks = z.reshape(400, 256)
    correlation = (blocks[1:] * blocks[:-1]).mean()  # neighbouring keys
    assert abs(correlation) < 4 / (399 * 256) ** 0.5


def test_fresh_noise_repeats_from_its_first_step_and_scales_with_the_step():
    a, b = Fresh(3), Fresh(3)
    first = [a.increment(k, 1.0, 0.75, (1000, 2), LIKE) for k in range(2)]
    again = [b.increment(k, 1.0, 0.75, (1000, 2), LIKE) for k in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert abs(first[0].var() - 0.25) < 4 * 0.25 * (2 / 2000) ** 0.5


def test_recorded_noise_says_what_it_has():
    noise = Recorded(torch.ones(2, 3, 1))
    assert torch.equal(noise.increment(1, 0.0, 0.1, (3, 1), torch.empty(0)), torch.ones(3, 1))
    with pytest.raises(ValueError, match="only 2 increments"):
        noise.increment(2, 0.0, 0.1, (3, 1), torch.empty(0))
    with pytest.raises(ValueError, match=r"\(3, 1\), not \(4, 1\)"):
        noise.increment(0, 0.0, 0.1, (4, 1), torch.empty(0))


def test_mix_spreads_neighbouring_keys():
    words = {mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(words) == 8000
