"""A certificate finds what is wrong with a process, says why, and lets good ones pass."""

import json
import sys

import pytest
import torch

import kakusan
import problems
from kakusan import SDE, Certificate, Dense, Diagonal, KakusanError, certify
from kakusan.certification.orders import promised
from kakusan.core.types import per_sample
from kakusan.processes.zoo import (
    CIR,
    Brownian,
    CriticallyDamped,
    DoubleWell,
    GeometricBrownian,
    Heston,
    OrnsteinUhlenbeck,
    Swirl,
)
from kakusan.solvers.forms import NoiseForm
from kakusan.solvers.solve import EulerMaruyama, Method
from problems import F64

FEW = 1024
SPIRAL = OrnsteinUhlenbeck([[0.8, -1.5], [0.9, 0.3]], [[0.7, 0.0], [0.4, 0.5]], mean=[0.5, -1.0])


def failures(found):
    return {row.check: row.why for row in found.rows if row.verdict == "fail"}


def checked(sde, starts=None, paths=256, **options):
    return certify(sde, starts, paths=paths, quiet=True, **options)


class Wave(SDE):
    """A process with nothing wrong about it, to break in one place."""

    start = torch.tensor([0.7, -0.4])

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return Diagonal(1 + 0.5 * x.sin())


# --- good ones


@pytest.mark.parametrize(
    "sde, holds",
    [
        (SPIRAL, {"stationary law", "transition law", "moments", "score", "reversal"}),
        (CIR(), {"stationary law", "transition law", "moments", "score", "reversal"}),
        (DoubleWell(), {"stationary law", "reversal"}),
        (Swirl(), {"stationary law", "reversal"}),
        (GeometricBrownian(), {"transition law", "moments", "score", "reversal"}),
        (Wave(), {"divergence", "derivatives of G", "strong order"}),
        (CriticallyDamped(), {"stationary law", "score", "reversal"}),
    ],
)
def test_good_processes_pass(sde, holds):
    found = checked(sde, paths=FEW)
    assert found.ok, found
    assert holds <= {row.check for row in found.rows if row.verdict == "pass"}, found


class Reversible(problems.Reversible):
    """With a sine for a hyperbolic tangent, and its divergence written out: both are faster."""

    def diffusion(self, x, t):
        G = (torch.sin(x @ self.W.T) @ self.V.T).reshape(-1, 2, 2)
        return Dense(0.7 * torch.eye(2, dtype=x.dtype) + G)

    def gram_divergence(self, x, t):
        G = self.diffusion(x, t).G
        dG = torch.einsum("bm,am,mj->baj", (x @ self.W.T).cos(), self.V, self.W)
        dG = dG.reshape(-1, 2, 2, 2)
        return torch.einsum("bikj,bjk->bi", dG, G) + torch.einsum("bik,bjkj->bi", G, dG)


def test_a_score_of_given_starts_brings_them_back():
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = checked(Reversible(), x, paths=512)
    assert found.ok and found["reversal"].why == "by its score(x, t)", found
    assert found["dtypes"].measured == "float64 only"


def test_measured_orders_are_those_of_theory():
    additive, general = checked(SPIRAL, paths=FEW), checked(Swirl(), paths=FEW)
    assert abs(additive["strong order"].value - 1) < 0.1, additive
    assert abs(additive["weak order"].value - 1) < 0.1, additive
    assert abs(general["strong order"].value - 0.5) < 0.1, general
    assert general["noise"].measured == "general" and additive["noise"].measured == "additive"


def test_an_exact_step_has_no_order_to_measure():
    found = checked(Brownian(0.7))
    assert found.ok and found["strong order"].measured == "exact", found


def test_a_small_weak_error_is_given_no_order():
    class Martingale(Wave):
        def drift(self, x, t):
            return torch.zeros_like(x)

    found = checked(Martingale(), paths=64)
    row = found["weak order"]
    assert row.verdict == "skipped" and "no order can be read" in row.why, found


def test_singular_noise_is_named():
    row = checked(CriticallyDamped())["ellipticity"]
    assert row.verdict == "pass" and "singular" in row.measured and "NotElliptic" in row.why


# --- broken ones: the right row, and a reason


class Mixing(Wave):
    def drift(self, x, t):
        return x.mean(0) - x


class Doubled(Wave):
    def drift(self, x, t):
        return -x * torch.tensor([1.0, 2.0], dtype=F64)


class OneTime(Wave):
    def drift(self, x, t):
        return -x * (1 + t.mean().to(x.dtype))


class Beside(Wave):
    def drift(self, x, t):
        return -x * t.to(x.dtype)


class Dropout(Wave):
    def drift(self, x, t):
        return torch.nn.functional.dropout(-x, 0.1)


class Misformed(Wave):
    def gram_divergence(self, x, t):
        return x.cos() * (1 + 0.5 * x.sin()) / 2


class Detached(Wave):
    def diffusion(self, x, t):
        return Diagonal(1 + 0.5 * x.detach().sin())


class Table(Wave):
    TABLE = 1 + torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=F64)

    def diffusion(self, x, t):
        return Diagonal(self.TABLE[(4 * x + 32).long().clamp(0, 63)].to(x.dtype))


class Lost(Wave):
    def diffusion(self, x, t):
        return Diagonal((x - 3).sqrt())


class Unsettled(Wave):
    def diffusion(self, x, t):
        return Diagonal(torch.full_like(x, 1.2))

    def log_stationary(self, x):
        return -x.square().sum(1) / 1.2**2 * 1.05


class Unscored(Unsettled):
    def log_stationary(self, x):
        return -x.square().sum(1) / 1.2**2

    def score_from(self, x0):
        def score(x, t):
            decay = per_sample((-t).exp(), x)
            return (x - decay * x0) / (1.2**2 / 2 * (1 - decay**2))

        return score


class Unmoved(Unscored):
    score_from = None

    def moments(self, x0, t):
        a = torch.as_tensor(-t, dtype=F64).exp()
        return x0 * a, torch.eye(2, dtype=F64)[None] * 1.2**2 * 0.75 * (1 - a * a)

    def log_transition(self, x, x0, t):
        a = per_sample((-t).exp(), x)
        return (-((x - 1.1 * a * x0) ** 2) / (1.2**2 * (1 - a * a)) - (1 - a * a).log()).sum(1)


class Shapeless(Wave):
    def drift(self, x, t):
        return -x.sum(1)


class NoOperator(Wave):
    def diffusion(self, x, t):
        return 1 + 0.5 * x.sin()


BROKEN = [
    (Mixing, "samples apart", "depends on the other samples"),
    (Doubled, "dtypes", "drift is float64 for states of float32"),
    (OneTime, "a time each", "own time"),
    (Beside, "shapes", "t of shape (5,)"),
    (Dropout, "repetition", "hidden randomness"),
    (Misformed, "divergence", "is not the divergence"),
    (Detached, "derivatives of G", "autograd does not see"),
    (Table, "derivatives of G", "table look-up"),
    (Lost, "finite", "not finite"),
    (Unsettled, "stationary law", "Fokker-Planck"),
    (Unscored, "score", "its sign is wrong"),
    (Unmoved, "moments", "simulated paths"),
    (Unmoved, "transition law", "Fokker-Planck"),
    (Shapeless, "shapes", "drift has shape (1,)"),
    (NoOperator, "shapes", "wrap it in Scale"),
]


@pytest.mark.parametrize("broken, check, words", BROKEN)
def test_a_broken_process_fails_the_right_row(broken, check, words):
    found = checked(broken(), paths=FEW)
    assert not found.ok and words in failures(found).get(check, ""), found


def test_what_is_not_broken_does_not_fail():
    alone = {Mixing: "samples apart", Doubled: "dtypes", OneTime: "a time each",
             Misformed: "divergence"}  # fmt: skip
    for broken, check in alone.items():
        assert set(failures(checked(broken()))) == {check}, broken


def test_a_wrong_divergence_does_not_come_back():
    class Forgetful(Swirl):
        def gram_divergence(self, x, t):
            return torch.zeros_like(x)

    found = checked(Forgetful(rotation=0.0), paths=2048)
    assert {"divergence", "reversal"} <= set(failures(found)), found
    assert "stationary law" not in failures(found)


def test_a_score_of_the_wrong_sign_is_not_that_of_its_law():
    class Turned(Unsettled):
        log_stationary = None

        def score(self, x, t):
            return x / (1.2**2 / 2)

    x = 1.2 / 2**0.5 * torch.randn(FEW, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = checked(Turned(), x, paths=FEW)
    assert {"score", "reversal"} <= set(failures(found)), found
    assert "its sign is wrong" in found["score"].why


# --- solvers


class Signs(Method):
    """Euler's step with signs for normal numbers: it follows the law, and no path."""

    def step(self, sde, x, t, s, dw, state):
        h = (s - t).item()
        return x + h * sde.drift(x, t) + sde.diffusion(x, t).mv(dw.sign() * h**0.5), state


class Sense(Method):
    """Heun's step in the sense of Stratonovich, which it does not say."""

    def step(self, sde, x, t, s, dw, state):
        h, G = (s - t).item(), sde.diffusion(x, t)
        end = sde.diffusion(x + G.mv(dw), s)
        return x + h * sde.drift(x, t) + (G.mv(dw) + end.mv(dw)) / 2, state


def test_a_method_slower_than_promised_fails():
    found = checked(Wave(), method=Signs(), promised=(0.5, 1.0))
    assert "promises order 0.5" in failures(found)["strong order"], found


def test_a_method_that_solves_another_equation_fails():
    found = checked(Wave(), method=Sense(), promised=(0.5, 1.0))
    assert "another equation" in failures(found)["limit"], found
    assert "strong order" not in failures(found)


def test_a_method_that_leaves_the_domain_is_told_of_a_better_one():
    found = checked(Heston())
    assert "Splitting() stays inside" in failures(found)["domain"], found
    assert 0 < found["domain"].value < 0.1


def test_methods_have_the_orders_of_theory():
    assert promised(EulerMaruyama(), NoiseForm.ADDITIVE) == (1.0, 1.0)
    assert promised(EulerMaruyama(), NoiseForm.GENERAL) == (0.5, 1.0)
    assert promised(EulerMaruyama(), None)[0] == 1.0
    assert promised(Signs(), NoiseForm.SCALAR) == (None, None)


def test_an_explosion_is_told_from_a_way_out():
    class Cubic(Wave):
        def drift(self, x, t):
            return x**3 * 4

    found = checked(Cubic())
    assert "TamedEuler" in failures(found)["explosion"], found


# --- the certificate, and the door


def test_a_certificate_prints_and_saves():
    found = checked(Misformed())
    lines = str(found).splitlines()
    assert "1 failed" in lines[0] and lines[1].split() == [
        "check", "verdict", "measured", "expected"
    ]  # fmt: skip
    starts = {line.index("pass") for line in lines if "  pass  " in line}
    assert len(starts) == 1, found
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["ok"] is False and record["process"] == "Misformed"
    assert {row["verdict"] for row in record["rows"]} == {"pass", "fail", "skipped"}
    assert all(row["why"] for row in record["rows"] if row["verdict"] != "pass")
    assert isinstance(found, Certificate) and found is not None
    with pytest.raises(KakusanError, match="no check 'nothing'"):
        found["nothing"]


def test_a_certificate_is_a_function_of_its_seed():
    a, b = (checked(Wave(), seed=7) for _ in range(2))
    assert a.rows == b.rows and a.rows != checked(Wave(), seed=8).rows


def test_certify_touches_no_global_randomness():
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    checked(Dropout(), paths=64)
    assert torch.rand(1) == first


def test_what_is_asked_wrongly_is_refused():
    with pytest.raises(KakusanError, match="takes an SDE, got a int"):
        certify(3)
    with pytest.raises(KakusanError, match="does not say where it starts"):
        certify(Reversible())
    with pytest.raises(KakusanError, match="at least 64"):
        certify(Wave(), paths=3)
    with pytest.raises(KakusanError, match="finite states"):
        certify(Wave(), torch.full((3, 2), float("nan")))


def test_time_dependent_and_reversed_spans_are_certified():
    class Late(Wave):
        span = (2.0, 0.5)

        def drift(self, x, t):
            return x * per_sample(t, x)

        def diffusion(self, x, t):
            G = torch.stack([x.cos() + 2, 0 * x, x * 0, x.sin() + 2], -1)
            return Dense(G[:, 0].reshape(-1, 2, 2))

    found = checked(Late())
    assert found.ok, found


def test_the_verb_check(tmp_path, capsys):
    from kakusan import cli

    (tmp_path / "mine.py").write_text(
        "import torch\nfrom kakusan import SDE, Diagonal\n"
        "class Good(SDE):\n"
        "    start = torch.ones(1)\n"
        "    def drift(self, x, t): return -x\n"
        "    def diffusion(self, x, t): return Diagonal(1 + x.sin() / 2)\n"
        "class Bad(Good):\n"
        "    def gram_divergence(self, x, t): return x\n"
    )
    with pytest.raises(SystemExit) as done:
        cli.main(["check", f"{tmp_path / 'mine.py'}:Bad", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert done.value.code == 1 and not record["ok"]
    with pytest.raises(SystemExit) as done:
        cli.main(["check", f"{tmp_path / 'mine.py'}:Good", "--start", "0.5", "--quiet"])
    assert done.value.code == 0 and "0 failed" in capsys.readouterr().out


def test_the_function_keeps_its_name_when_its_room_is_open():
    assert kakusan.certify is certify and "kakusan.certification" in sys.modules
