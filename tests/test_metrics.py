"""Laws of the metrics: closed forms, honest errors, no bias, and the sentences of bad input."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from kakusan.errors import KakusanError, UsageError
from kakusan.inference import features as feats
from kakusan.inference import metrics as km
from kakusan.inference.metrics import comparison
from kakusan.inference.metrics.neighbours import _nearest

torch.set_num_threads(1)


def normal(n, d, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def near(estimate, truth, errors=4.0):
    return abs(estimate.value - truth) <= errors * estimate.std_error


# --- closed forms -----------------------------------------------------------------------------


def absolute_mean(mean, variance):
    """E |z| for z ~ N(mean, variance)."""
    s = math.sqrt(variance)
    gauss = s * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance))
    return gauss + mean * math.erf(mean / (s * math.sqrt(2)))


def test_energy_distance_of_a_shifted_gaussian():
    estimate = km.energy_distance(normal(2000, 1, 0, shift=0.7), normal(1500, 1, 1))
    truth = 2 * absolute_mean(0.7, 2) - 2 * absolute_mean(0, 2)
    assert near(estimate, truth), (estimate, truth)
    assert estimate.std_error < 0.1 * truth
    assert estimate.n == 1500


def test_mmd_of_a_shifted_gaussian():
    w, m = 1.3, 0.7

    def mean_kernel(shift):  # E exp(-z^2 / 2 w^2) for z ~ N(shift, 2)
        return w / math.sqrt(w**2 + 2) * math.exp(-(shift**2) / (2 * (w**2 + 2)))

    estimate = km.mmd(normal(2000, 1, 0, shift=m), normal(1500, 1, 1), width=w, scales=(1.0,))
    truth = 2 * mean_kernel(0) - 2 * mean_kernel(m)
    assert near(estimate, truth), (estimate, truth)
    assert estimate.std_error < 0.15 * truth


def test_kernel_distance_against_torchmetrics():
    # its one "subset" of everything is the same unbiased estimate
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(60, 5, 0, shift=0.3), normal(60, 5, 1)
    assert km.kernel_distance(x, y).value == pytest.approx(float(poly_mmd(x, y)), rel=1e-10)


def test_sliced_wasserstein_of_a_shift():
    # E over directions of <m, theta>^2 is |m|^2 / d
    x, d = normal(500, 8, 0), 8
    shift = torch.linspace(1, 3, d, dtype=torch.float64)
    estimate = km.sliced_wasserstein(x + shift, x, 2000)
    truth = math.sqrt(float(shift.square().sum()) / d)
    assert near(estimate, truth), (estimate, truth)
    apart = km.sliced_wasserstein(x + shift, normal(400, 8, 1))
    assert near(apart, truth), (apart, truth)


def test_sliced_wasserstein_in_one_dimension():
    # W_2^2 of N(m, s^2) and N(0, 1) is m^2 + (s - 1)^2
    x, y = normal(4000, 1, 0, shift=1.0, scale=2.0), normal(3000, 1, 1)
    assert near(km.sliced_wasserstein(x, y, 4), math.sqrt(2))


def test_frechet_of_two_gaussians():
    mean = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    x, y = normal(6000, 3, 0) * scale + mean, normal(6000, 3, 1)
    truth = float(mean.square().sum() + (scale - 1).square().sum())
    assert near(km.frechet(x, y), truth), (km.frechet(x, y), truth)
    # the distance of the fitted Gaussians does not depend on where the origin lies
    assert km.frechet(x + 100, y + 100).value == pytest.approx(km.frechet(x, y).value, rel=1e-6)


def test_frechet_bias_is_the_documented_one():
    n, d = 400, 10
    values = [km.frechet(normal(n, d, s), normal(n, d, s + 100), groups=2) for s in range(12)]
    mean = sum(e.value for e in values) / len(values)
    assert mean == pytest.approx(2 / n * d * (d + 5) / 4, rel=0.15)


def modes(weights, n, seed):
    """Well-separated narrow Gaussians in the plane."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)
    return 10.0 * which[:, None] + 0.5 * torch.randn(n, 2, generator=generator)


def test_precision_and_recall_see_modes():
    both, one = modes([0.5, 0.5], 400, 0), modes([1.0, 0.0], 400, 1)
    precision, recall = km.precision_recall(both, one)  # x invents a mode
    assert abs(precision.value - 0.5) < 4 * precision.std_error and recall.value > 0.9
    precision, recall = km.precision_recall(one, both)  # x misses a mode
    assert abs(recall.value - 0.5) < 4 * recall.std_error and precision.value > 0.9


def test_precision_and_recall_against_the_definition():
    x, y, k = normal(70, 3, 0, shift=0.8), normal(70, 3, 1), 4
    precision, recall = km.precision_recall(x, y, k, chunk=16)

    def inside(a, b):
        radius = torch.cdist(b, b).sort(1).values[:, k]  # the 0-th is the point itself
        return float((torch.cdist(a, b) <= radius).any(1).double().mean())

    assert (precision.value, recall.value) == (inside(x, y), inside(y, x))


def test_equal_points_lie_in_balls_of_radius_zero():
    x = torch.arange(4.0).repeat(30)[:, None].expand(-1, 3) * 7.3
    precision, recall = km.precision_recall(x, x.flip(0))
    assert (precision.value, recall.value) == (1.0, 1.0)


def test_nearest_neighbour_tells_copies_from_new_points():
    data = normal(1200, 4, 0).float()
    train, test, fresh = data[:800], data[800:1000], data[1000:]
    copied = km.nearest_neighbour(train[100:300], train, test)
    assert copied.ratio < 1e-6
    new = km.nearest_neighbour(fresh, train, test)
    assert abs(new.ratio - 1) < 4 * new.std_error < 0.5
    assert new.sample_median == pytest.approx(
        float(torch.cdist(fresh, train).min(1).values.quantile(0.5)), rel=1e-5
    )


# --- one law on both sides --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_unbiased_metrics_are_zero_for_one_law(seed):
    x, y = normal(300, 6, seed), normal(200, 6, seed + 50)
    for metric in (km.energy_distance, km.mmd, km.kernel_distance):
        assert near(metric(x, y), 0.0), metric
    accuracy = km.two_sample_test(x[:150], y[:150], seed=seed)
    assert near(accuracy, 0.5), accuracy


def test_two_sample_test_reaches_the_best_possible_accuracy():
    # of N(m, 1) and N(0, 1), Bayes' rule guesses right with probability Phi(m / 2)
    x, y = normal(600, 2, 0, shift=torch.tensor([1.5, 0.0])), normal(500, 2, 1)
    bayes = 0.5 * (1 + math.erf(0.75 / math.sqrt(2)))
    for classifier in (None, LogisticRegression()):
        accuracy = km.two_sample_test(x, y, classifier=classifier)
        assert near(accuracy, bayes) and accuracy.n == 500, classifier


# --- honest errors ----------------------------------------------------------------------------

METRICS = {
    "sliced_wasserstein": lambda x, y, seed: km.sliced_wasserstein(x, y, 64, seed=seed),
    "energy_distance": lambda x, y, seed: km.energy_distance(x, y),
    "mmd": lambda x, y, seed: km.mmd(x, y, seed=seed),
    "kernel_distance": lambda x, y, seed: km.kernel_distance(x, y),
    "frechet": lambda x, y, seed: km.frechet(x, y, seed=seed),
    "precision": lambda x, y, seed: km.precision_recall(x, y, 3, seed=seed)[0],
    "recall": lambda x, y, seed: km.precision_recall(x, y, 3, seed=seed)[1],
}


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("name", METRICS)
def test_std_error_is_the_spread_over_repetitions(name, shift):
    repeats = 40
    estimates = [
        METRICS[name](normal(120, 3, s, shift=shift), normal(90, 3, s + 1000), s)
        for s in range(repeats)
    ]
    spread = torch.tensor([e.value for e in estimates]).std().item()
    error = sum(e.std_error for e in estimates) / repeats
    # 40 values fix the spread to 1 / sqrt(80) = 11%
    doubt = 1 + 3 / math.sqrt(2 * repeats)
    assert 1 / (1.2 * doubt) < error / spread < 1.5 * doubt, (error, spread)


def test_two_sample_test_error_is_the_spread_over_repetitions():
    fast = LogisticRegression()
    estimates = [
        km.two_sample_test(normal(90, 3, s, shift=0.5), normal(90, 3, s + 99), classifier=fast)
        for s in range(40)
    ]
    ratio = torch.tensor([e.value for e in estimates]).std().item() / estimates[0].std_error
    assert 1 / 1.5 < ratio < 1.5


def test_nearest_neighbour_error_is_the_spread_over_repetitions():
    train = normal(400, 3, 999)
    estimates = [
        km.nearest_neighbour(normal(80, 3, s), train, normal(90, 3, s + 99)) for s in range(40)
    ]
    spread = torch.tensor([e.ratio for e in estimates]).std().item()
    error = sum(e.std_error for e in estimates) / len(estimates)
    assert 1 / 1.5 < error / spread < 1.5


# --- the same number by another way -----------------------------------------------------------


def test_chunks_change_nothing():
    x, y = normal(130, 4, 0, shift=0.2), normal(75, 4, 1)
    for metric in (km.energy_distance, km.mmd, km.kernel_distance):
        assert metric(x, y, chunk=32) == pytest.approx(metric(x, y, chunk=1000), rel=1e-9)
    assert km.precision_recall(x, y, chunk=32) == km.precision_recall(x, y, chunk=1000)
    near_by, near_at_once = _nearest(x, y, chunk=16), _nearest(x, y)
    assert torch.equal(near_by, near_at_once)


def test_shape_of_a_sample_and_dtype_do_not_matter():
    x, y = normal(60, 12, 0, shift=0.3), normal(50, 12, 1)
    pictures = [z.reshape(-1, 1, 3, 4).float() for z in (x, y)]
    for metric in (km.energy_distance, km.mmd, km.sliced_wasserstein, km.frechet):
        assert metric(*pictures) == pytest.approx(metric(x, y), rel=1e-4), metric


# --- compare ----------------------------------------------------------------------------------


def test_compare_prints_every_metric_beside_its_floor():
    data = normal(900, 4, 0).float().reshape(-1, 1, 2, 2)
    train, test = data[:600], data[600:700]
    rows = km.compare(data[700:], test, train, feats.Pixels(), limit=150)
    assert list(rows) == [
        "sliced_wasserstein", "energy_distance", "mmd", "two_sample_test", "precision",
        "recall", "frechet", "kernel_distance", "nearest_neighbour",
    ]  # fmt: skip
    for name, row in rows.items():
        # the samples are of the data's law, so they reach the floor
        doubt = math.hypot(row.std_error, row.floor_std_error)
        assert abs(row.value - row.floor) < 4 * doubt, name
        assert row.n == 100, name
    assert rows["frechet"].features == "pixels-pca64" and rows["mmd"].features == "values"
    again = km.compare(data[700:], test, train, feats.Pixels(), limit=150)
    assert again == rows
    shifted = km.compare(data[700:] + 1, test, train, feats.Pixels(), limit=150)
    for name in ("sliced_wasserstein", "energy_distance", "mmd", "two_sample_test", "frechet"):
        assert shifted[name].value > rows[name].value + 4 * rows[name].std_error, name
        assert shifted[name].floor == rows[name].floor, name


def test_compare_measures_value_and_floor_at_equal_counts(monkeypatch):
    seen = []

    def note(x, y, *_):
        seen.append((len(x), len(y)))
        return {}

    monkeypatch.setattr(comparison, "_measure", note)
    km.compare(normal(90, 2, 0), normal(70, 2, 1), normal(80, 2, 2), feats.Pixels(), limit=75)
    assert seen == [(75, 70), (75, 70)]


def test_compare_says_why_nearest_neighbour_is_missing():
    train = normal(60, 2, 0)
    with pytest.warns(UserWarning, match="copies of training points"):
        rows = km.compare(normal(60, 2, 1), train[:40], train, feats.Pixels())
    assert "nearest_neighbour" not in rows and "mmd" in rows


# --- features ---------------------------------------------------------------------------------


def test_pixels_keep_the_leading_components():
    train = normal(300, 100, 0) * torch.logspace(0, -4, 100)
    pixels = feats.features_named("pixels-pca64", train)
    x = train[:50].reshape(50, 1, 10, 10).flatten(1)
    found = pixels(x)
    assert found.shape == (50, 64) and pixels.name == "pixels-pca64"
    kept = torch.cdist(found.double(), found.double())
    assert torch.allclose(kept, torch.cdist(x, x), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 17), (5, 32, 32)])
def test_random_conv_is_fixed_by_its_seed(shape):
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    one, two = feats.RandomConv(3), feats.features_named("random-conv-3")
    assert torch.equal(one(x), two(x)) and one.name == two.name == "random-conv-3"
    assert not torch.allclose(one(x), feats.RandomConv(4)(x))
    assert one(x).std() > 0.05 and one(x).shape == (4, 128)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("shape", [(1, 8, 8), (6,)])
def test_classifier_features_separate_the_classes(shape):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (240,), generator=generator)
    centres = torch.randn(3, *shape, generator=generator)
    train = centres[labels] + 0.3 * torch.randn(240, *shape, generator=generator)
    state = torch.random.get_rng_state()
    one = feats.Classifier(steps=60).fit(train, labels * 5)
    assert torch.equal(state, torch.random.get_rng_state())
    found = one(train)
    assert found.shape == (240, 64)
    means = torch.stack([found[labels == c].mean(0) for c in range(3)])
    assert (torch.cdist(found, means).argmin(1) == labels).double().mean() > 0.95
    assert torch.equal(found, feats.Classifier(steps=60).fit(train, labels * 5)(train))


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_gets_a_sentence():
    x, y = normal(30, 3, 0), normal(20, 3, 1)
    broken = x.clone()
    broken[7, 1] = torch.nan
    broken[9, 0] = torch.inf
    for metric in (km.energy_distance, km.mmd, km.sliced_wasserstein, km.frechet,
                   km.kernel_distance, km.two_sample_test, km.precision_recall):  # fmt: skip
        with pytest.raises(KakusanError, match=r"\(30, 3\).*\(20, 2\)"):
            metric(x, y[:, :2])
        with pytest.raises(KakusanError, match=r"2 samples .* not finite.* row 7"):
            metric(broken, y)
        with pytest.raises(KakusanError, match=r"\(1, 3\).*at least"):
            metric(x, y[:1])
    with pytest.raises(KakusanError, match="12 samples"):
        km.precision_recall(x[:11], y, k=5)
    with pytest.raises(KakusanError, match="all 20 samples.*equal"):
        km.mmd(x, torch.ones(20, 3))
    with pytest.raises(KakusanError, match="training split.*row 7"):
        km.nearest_neighbour(x, broken, y)
    with pytest.raises(KakusanError, match="training split has shape"):
        km.compare(x, y, x[:0], feats.Pixels())


def test_bad_features_get_a_sentence():
    with pytest.raises(UsageError, match="'random-conv-0'"):
        feats.features_named("random-cnov")
    with pytest.raises(UsageError, match="labelled"):
        feats.features_named("classifier", torch.zeros(9, 2))
    with pytest.raises(KakusanError, match="call fit"):
        feats.Pixels()(torch.zeros(2, 100))
    with pytest.raises(KakusanError, match="fit them anew"):
        feats.Pixels().fit(normal(80, 100, 0))(torch.zeros(2, 99))
    with pytest.raises(KakusanError, match=r"8 by 8.*\(5, 1, 7, 9\)"):
        feats.RandomConv()(torch.zeros(5, 1, 7, 9))
    with pytest.raises(KakusanError, match="two classes"):
        feats.Classifier().fit(torch.zeros(9, 2), torch.ones(9, dtype=torch.long))
    with pytest.raises(KakusanError, match="one integer label"):
        feats.Classifier().fit(torch.zeros(9, 2), torch.ones(8))
    with pytest.raises(KakusanError, match="not trained"):
        feats.Classifier()(torch.zeros(9, 2))
