"""One Brownian path per seed: its law, and the same numbers at any refinement, in any order."""

import math

import pytest
import torch

from kakusan import Counter, CounterWithArea, Fresh, KakusanError, Keyed, Recorded
from kakusan.core.counter import Sweep, key_words, mixed_words
from kakusan.core.noise import Wants, mix

LIKE = torch.empty(0, dtype=torch.float64)
KINDS = [Counter, CounterWithArea]


def _increments(path, times, shape=(50, 2)):
    pairs = list(zip(times, times[1:], strict=False))
    return torch.stack([path.increment(k, t, s, shape, LIKE) for k, (t, s) in enumerate(pairs)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [(4, 8), (5, 20), (3, 300), (7, 7 * 64), (1, 1000)])
def test_a_coarse_grid_sees_sums_of_a_fine_one(kind, steps):
    few, many = steps
    path = kind(5, cell=0.01)
    coarse, fine = (
        _increments(path, torch.linspace(0.2, 2.7, n + 1, dtype=torch.float64).tolist())
        for n in steps
    )
    summed = fine.reshape(few, many // few, *fine.shape[1:]).sum(1)
    assert torch.allclose(coarse, summed, atol=1e-12), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_questions_and_the_batch_do_not_matter(kind):
    times = [0.0, 0.013, 0.37, 0.371, 1.0, 1.9]
    forward = _increments(kind(1), times)
    path, last = kind(1), {}
    for k in (4, 0, 3, 1, 2):
        last[k] = path.increment(k, times[k], times[k + 1], (50, 2), LIKE)
    assert torch.equal(forward, torch.stack([last[k] for k in range(5)]))
    part = kind(1, first=10)
    assert torch.equal(part.increment(0, 0.013, 0.37, (5, 2), LIKE), forward[1, 10:15])
    assert torch.equal(kind(1).increment(0, 0.37, 0.013, (50, 2), LIKE), forward[1])
    for other in (kind(2), kind(1, stream=1)):
        assert not torch.equal(_increments(other, times), forward)


@pytest.mark.parametrize("kind", KINDS)
def test_increments_are_independent_normals_of_the_right_variance(kind):
    n, times = 100_000, [0.0, 0.3, 0.31, 0.75, 1.0, 1.024, 2.5]
    w = _increments(kind(2, cell=0.05), times, (n, 1))[..., 0]
    z = w / torch.tensor(times, dtype=torch.float64).diff().sqrt()[:, None]
    error = n**-0.5
    assert z.mean(1).abs().max() < 4.5 * error
    assert (z.var(1) - 1).abs().max() < 4.5 * 2**0.5 * error
    assert ((z**4).mean(1) - 3).abs().max() < 4.5 * 96**0.5 * error
    correlation = z @ z.T / n - torch.eye(len(z), dtype=torch.float64)
    assert correlation.fill_diagonal_(0).abs().max() < 4.5 * error
    squares = (z**2 - 1) @ (z**2 - 1).T / n
    assert squares.fill_diagonal_(0).abs().max() < 4.5 * 2 * error


@pytest.mark.parametrize(
    "noise", [CounterWithArea(3, cell=0.1), Fresh(3), Keyed(3)], ids=lambda n: type(n).__name__
)
@pytest.mark.parametrize("ends", [(0.4, 0.9), (0.9, 0.4), (0.13, 0.2)])
def test_areas_have_their_law(noise, ends):
    """Var z = h³/3, Cov(w, z) = h²/2, both ways."""
    n, h = 100_000, abs(ends[1] - ends[0])
    w, z = noise.area(0, *ends, (n, 1), LIKE)
    for found, truth in (((w * w), h), ((w * z), h**2 / 2), ((z * z), h**3 / 3)):
        assert abs(found.mean() - truth) < 4.5 * found.std() / n**0.5, (noise, truth)


def test_areas_add_up_at_any_refinement():
    """z over [a, c] = z over [a, b] + (c - b) w over [a, b] + z over [b, c]."""
    path, shape = CounterWithArea(7, cell=0.02), (20, 3)
    for a, b, c in ((0.0, 0.5, 1.0), (0.1, 0.22, 0.9), (0.3, 0.301, 0.35)):
        for t, m, s in ((a, b, c), (c, b, a)):
            (w1, z1), (w2, z2) = path.area(0, t, m, shape, LIKE), path.area(1, m, s, shape, LIKE)
            w, z = path.area(0, t, s, shape, LIKE)
            assert torch.allclose(w, w1 + w2, atol=1e-12)
            assert torch.allclose(z, z1 + abs(s - m) * w1 + z2, atol=1e-12), (t, s)


def test_a_recording_adds_up_too():
    times = [0.0, 0.1, 0.4, 0.5, 1.0]
    dw, dz = torch.randn(2, 4, 5, 2, dtype=torch.float64).unbind(0)
    path = Recorded(dw, times, dz)
    assert torch.equal(path.increment(0, 0.1, 1.0, (5, 2), LIKE), dw[1:].sum(0))
    w, z = path.area(0, 0.0, 0.4, (5, 2), LIKE)
    assert torch.allclose(z, dz[0] + 0.3 * dw[0] + dz[1]) and torch.equal(w, dw[:2].sum(0))
    with pytest.raises(KakusanError, match=r"t=0.2 is not among the recorded times.*is 0.1"):
        path.increment(0, 0.0, 0.2, (5, 2), LIKE)
    with pytest.raises(KakusanError, match="runs the other way"):
        path.increment(0, 0.4, 0.1, (5, 2), LIKE)


@pytest.mark.parametrize("noise", [Counter(0), Fresh(0), Keyed(0)])
def test_three_points_have_five_moments_of_a_normal(noise):
    n, h = 200_000, 0.25
    z = noise.three_point(0, 0.0, h, (n, 1), LIKE) / math.sqrt(h)
    assert set(z.flatten().tolist()) == {-math.sqrt(3), 0.0, math.sqrt(3)}
    # the variances of z^k: E z^2k - (E z^k)^2 with E z^2k = 3^(k-1)
    for k, truth in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0)):
        error = ((3 ** (k - 1) - truth**2) / n) ** 0.5
        assert abs((z**k).mean() - truth) < 4.5 * error, (noise, k)


def test_runs_that_meet_at_a_time_share_no_numbers():
    """A process run in two legs with one path: the variances add up."""
    n, path = 100_000, Counter(3, cell=0.25)
    for want in (Wants.WEAK, Wants.THREE_POINT, Wants.INCREMENT):
        total = torch.zeros(n, 1, dtype=torch.float64)
        for t in (0.0, 0.5):
            dw = path.want(want, 0, t, t + 0.5, (n, 1), LIKE)
            total += dw[0] if isinstance(dw, tuple) else dw
        assert abs(total.var() - 1) < 4.5 * total.square().std() / n**0.5, want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", [False, True])
def test_a_sweep_unfolds_what_single_steps_say(kind, back):
    path, shape = kind(3, cell=0.01), (5, 2)
    times = [0.08 * i + 0.16 for i in range(24)]
    times = times[::-1] if back else times
    wants = [Wants.INCREMENT, Wants.THREE_POINT, *([Wants.AREA] if path.areas else [])]
    for want in wants:
        sweep = Sweep(path, want, times, 4)
        assert sweep.fits
        lane = path.lanes_of(shape, LIKE)
        for k in range(sweep.lead, 23 - 4, 4):
            found = sweep.unfold(sweep.inputs(k, lane, LIKE, None), lane, LIKE.dtype)
            for i in range(4):
                truth = path.want(want, k + i, times[k + i], times[k + i + 1], shape, LIKE)
                pairs = zip(found[i], truth, strict=True) if path.areas and want is Wants.AREA \
                    else [(found[i], truth)]  # fmt: skip
                for a, b in pairs:
                    assert torch.allclose(a, b, atol=1e-14), (want, k, i)
    assert not Sweep(path, Wants.INCREMENT, [0.0, 0.03, 0.06, 0.09, 0.12], 4).fits


def test_both_precisions_walk_one_path():
    a, b = (Counter(1).increment(0, 0.0, 0.7, (1000, 1), LIKE.to(d))
            for d in (torch.float32, torch.float64))  # fmt: skip
    assert torch.allclose(a.double(), b, atol=1e-5)


def test_keys_are_hashed_alike_one_by_one_and_together():
    words = mixed_words(mix(1, 2), torch.tensor([-3, 0, 5]))
    assert torch.equal(words, key_words(*(mix(1, 2, i) for i in (-3, 0, 5))))


def test_what_a_path_cannot_do_is_said():
    with pytest.raises(KakusanError, match="wants the area.*CounterWithArea\\(4, cell=0.001\\)"):
        Counter(4).area(0, 0.0, 1.0, (2, 1), LIKE)
    with pytest.raises(KakusanError, match="length > 0, got -1"):
        Counter(4, cell=-1.0)
    with pytest.raises(KakusanError, match="shorter than a path with cells of 1 resolves"):
        Counter(4, cell=1.0).increment(0, 0.5, 0.5 + 1e-12, (2, 1), LIKE)
    with pytest.raises(KakusanError, match="more than the 2\\^32 lanes"):
        Counter(4, first=(1 << 32) - 10).increment(0, 0.0, 1.0, (20, 1), LIKE)
    path = Counter(4, cell=0.01)
    with pytest.warns(UserWarning, match="no cells of Counter.*cell=0.0033.* cost one"):
        _increments(path, torch.linspace(0, 0.33, 101, dtype=torch.float64).tolist(), (2, 1))
