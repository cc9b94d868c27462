"""`kakusan bridge`: numbers against closed forms, files, reuse, pictures, and every mistake."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from kakusan import KakusanError, UsageError, bridge_charts, bridge_luck, bridging
from kakusan.bridge_request import Request, inequality, pose
from kakusan.bridges import learn_bridge
from kakusan.bridges.files import about_bridge, load_bridge, save_bridge
from kakusan.bridging import bridged
from kakusan.cli import _run
from kakusan.inference.conditioning.learned import BridgeTilt
from kakusan.inference.conditioning.linear import LinearTilt
from kakusan.inference.conditioning.tilts import Untilted
from kakusan.processes.observations import Coordinates, Event, Measured, Series, Terminal
from kakusan.processes.zoo import (
    CIR,
    Brownian,
    CellModel,
    DoubleWell,
    FitzHughNagumo,
    OrnsteinUhlenbeck,
)
from kakusan.solvers.rosenbrock import RosenbrockSteps
from kakusan.training.ema import Average

MINE = """
import torch
from kakusan import SDE, Scale, Zero

class Decay(SDE):
    start = [1.0]
    def __init__(self, rate: float = 1.0): self.rate = rate
    def drift(self, x, t): return -self.rate * x
    def diffusion(self, x, t): return Scale(1.0)

turn = SDE.of(lambda x, t: torch.stack([x[:, 1], -x[:, 0]], 1), Zero())
nowhere = SDE.of(lambda x, t: -x, Scale(1.0))
"""
DRAW = bridge_charts.draw
SMALL = ("--steps", 10, "--iterations", 4, "-n", 60)


@pytest.fixture(autouse=True)
def less(monkeypatch):
    """Fewer paths: weights make up for what is not learned."""
    small = functools.partial(learn_bridge, paths=256, times=8, batch=512)
    monkeypatch.setattr(bridging, "learn_bridge", small)
    monkeypatch.setattr(bridge_luck, "MANY", 12_000)


@pytest.fixture
def kakusan(capsys, tmp_path, monkeypatch):
    """Runs `kakusan bridge` in a folder of its own: (exit code, standard output, error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bridge_charts, "draw", lambda found, path: path)
    (tmp_path / "mine.py").write_text(MINE)

    def run(*words):
        code = _run(["bridge", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


# --- numbers


def gaussian(x0, y, steps):
    """Log p(y | x0), and mean and variance half way given y, of Euler's chain of OU."""
    h, N = 1 / steps, steps
    a = [(1 - h) ** k for k in range(N + 1)]
    var = [h * sum(b**2 for b in a[:k]) for k in range(N + 1)]
    m, c = a[N // 2] * x0, a[N - N // 2] * var[N // 2]
    away = y - a[N] * x0
    log_p = -(away**2) / 2 / var[N] - math.log(2 * math.pi * var[N]) / 2
    return log_p, m + c / var[N] * away, var[N // 2] - c**2 / var[N]


def test_numbers_are_those_of_the_closed_form():
    asked = Request(end=(0.5,), start=torch.ones(1, 1), n=2000, steps=20, iterations=60)
    found = bridged(OrnsteinUhlenbeck(), asked)
    log_p, mean, var = gaussian(1.0, 0.5, 20)
    assert abs(found.log_density.value - log_p) < 1e-9  # all weights are one number
    luck = found.free_log_density
    assert abs(luck.value - log_p) < 5 * luck.std_error < 0.3
    row = found.middle[0]
    assert abs(row["mean"] - mean) < 5 * row["std_error"] < 0.2
    assert abs(row["std"] - var**0.5) < 5 * row["std"] / (2 * found.paths.ess) ** 0.5
    # the rejection sample: 1000 of 12,000, so near that its bias is below its error
    assert found.free.enough and found.free.x.shape[1] == bridge_luck.MOST
    assert found.free.within < 0.1
    assert abs(row["free_mean"] - mean) < 5 * row["free_std_error"] + found.free.within**2
    assert abs(row["free_std"] - var**0.5) < 5 * row["free_std"] / 2000**0.5
    assert found.missed == 0 and not found.guided and found.share > 0.3


def test_the_share_near_a_steep_place_tells_its_density():
    """Of a density exp(a·u) in a box: the share alone would be 2.3 and 1.1 times too large."""
    near, of, within, scale = 20_000, 10**6, 0.2, torch.tensor([1.0, 0.5], dtype=torch.float64)
    w, b = within * scale, torch.tensor([2.4, -0.8], dtype=torch.float64)
    u = torch.rand(near, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = (u * (2 * b).expm1() + 1).log() / (2 * b) > 0.5  # above the middle, by its inverse CDF
    free = bridge_luck.Free(torch.zeros(1, near, 2), near, within, of, at.sum(0))
    found = free.log_density(scale)
    p = near / of / (2 * w * b.sinh() / b).prod().item()
    assert abs(found.value - math.log(p)) < 4 * found.std_error < 0.1
    assert free._replace(above=torch.tensor([near, 0])).log_density(scale) is None
    assert free._replace(x=free.x[:, :29]).log_density(scale) is None


def test_an_event_has_its_probability():
    asked = Request(event="x > 1", start=torch.zeros(1, 1), n=3000, steps=20, iterations=60)
    found = bridged(OrnsteinUhlenbeck(), asked)
    var = sum((1 - 1 / 20) ** (2 * k) for k in range(20)) / 20
    p = math.erfc(1 / (2 * var) ** 0.5) / 2
    for density in (found.log_density, found.free_log_density):
        assert abs(density.value - math.log(p)) < 5 * density.std_error < 0.4
    assert (found.paths.log_weights[found.paths.missed > 0] == -math.inf).all()
    assert found.missed is None and (found.free.x[-1] > 1).all()


def test_starts_are_averaged_over():
    starts = torch.tensor([[-1.0], [1.0]]).double()
    asked = Request(end=(1.0,), start=starts, n=3000, steps=10, iterations=40)
    found = bridged(OrnsteinUhlenbeck(), asked)
    p = sum(math.exp(gaussian(x, 1.0, 10)[0]) for x in (-1, 1)) / 2
    density = found.log_density
    assert abs(density.value - math.log(p)) < 5 * density.std_error < 0.4
    first = found.paths.expectation(lambda x: x[0])
    exact = sum(x * math.exp(gaussian(x, 1.0, 10)[0]) for x in (-1, 1)) / 2 / p
    assert abs(first.value - exact) < 5 * first.std_error


def test_weighted_quantiles_are_those_of_equal_weights():
    g = torch.Generator().manual_seed(0)
    x, levels = torch.randn(101, 2, generator=g).double(), (0.05, 0.31, 0.5, 0.95)
    found = bridge_charts.weighted_quantiles(x, torch.full((101,), 3.0), levels)
    assert np.allclose(found, np.quantile(x, levels, 0, method="hazen"))
    twice = bridge_charts.weighted_quantiles(
        torch.cat([x, x + 100]), torch.tensor([0.0] * 101 + [-math.inf] * 101), levels
    )
    assert torch.allclose(found, twice)


@pytest.mark.filterwarnings("ignore:only")
def test_paths_that_never_come_are_drawn_there():
    said = []
    asked = Request(end=(-1.0,), start=torch.ones(1, 1), n=200, steps=100, iterations=30)
    found = bridged(DoubleWell(v=5.0), asked, say=said.append)
    assert found.guided and found.trial.near < bridging.FEW and "none of 4,000" in said[0]
    assert not found.free.enough and found.free.of == bridge_luck.HOPELESS
    with pytest.warns(UserWarning, match=r"only .* of 200 paths count.*--guided"):
        free = bridged(DoubleWell(v=5.0), Request(**{**vars(asked), "guided": False}))
    assert not free.guided and free.share < bridging.LEAST
    near = Request(end=(0.9,), start=torch.ones(1, 1), n=50, steps=100, iterations=2, guided=True)
    assert bridged(DoubleWell(v=5.0), near).guided


def test_events_are_parsed_and_not_run():
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    for text, holds in (
        ("x1>1", [0, 1]),
        (" x2 >= 2.0 ", [1, 0]),
        ("X2<=-1e-3", [0, 0]),
        ("x1<+2.", [1, 0]),
    ):
        event, _ = inequality(text, x)
        assert event.draw(x).flatten().tolist() == holds, text
    for text in (
        "x1",
        "1>x1",
        "x1>1>0",
        "x1>x2",
        "x1=1",
        "x1>nan",
        "(x1)>1",
        "x1>1;x",
        "x1>1e999",
    ):
        with pytest.raises(UsageError):
            inequality(text, x)


# --- files


def cases():
    """Processes, observations and values of all that a file can hold."""
    at = torch.tensor([-0.5, -0.6])
    H, both = torch.tensor([[1.0, -1.0]]), Coordinates([1], 0.1)
    return {
        "pull": (DoubleWell(v=1.0), torch.ones(1), None, None, [-1.0]),
        "linear": (OrnsteinUhlenbeck(rate=2.0), torch.ones(1), None, None, [0.5]),
        "linearised": (FitzHughNagumo(span=(0.0, 1.0)), at, Coordinates([0]), None, [-0.5]),
        "around": (CellModel(), at.abs(), Coordinates([1]), None, [0.5]),
        "untilted": (OrnsteinUhlenbeck(), torch.zeros(1), Event(lambda x: x[:, 0] > 0), None, [1]),
        "guided": (CIR(), torch.ones(1), None, torch.tensor([[1.2]]), [1.2]),
        "matrix": (CellModel(), at.abs(), Measured(H, 0.1), None, [0.1]),
        "series": (CellModel(), at.abs(), Series({2.0: both, 4.0: Terminal()}), None, [0.3, 1, 1]),
    }


@pytest.mark.parametrize("case", sorted(cases()))
def test_what_is_read_gives_the_numbers_of_what_was_written(case, tmp_path):
    sde, start, observe, ends, y = cases()[case]
    # an end of its own, before that of the span
    grid = torch.linspace(0, sde.span[1] / (1 if case == "series" else 2), 21).double()
    base = None
    if case == "around":
        base = LinearTilt.around(sde, observe, start.double(), grid[-1].item())
    bridge = learn_bridge(sde, start, observe, ends, grid=grid, base=base, iterations=3, paths=128)
    tilt = bridge.tilt
    tilt.net.trust.fill_(0.7)  # whatever training found
    tilt = BridgeTilt(tilt.base, tilt.observation, tilt.net, tilt.end)
    bridge = dataclasses.replace(bridge, tilt=tilt)
    save_bridge(bridge, tmp_path / "a", {"by": "me"})
    before, state = (tmp_path / "a").read_bytes(), torch.get_rng_state()
    again = load_bridge(tmp_path / "a", sde, observe if case == "untilted" else None)
    assert torch.equal(state, torch.get_rng_state()), "reading draws no numbers"
    a, b = (one.sample(start.double(), y, n=20) for one in (bridge, again))
    assert torch.equal(a.x, b.x) and torch.equal(a.log_weights, b.log_weights), case
    assert again.report == bridge.report and torch.equal(again.values, bridge.values)
    assert again.guided is (ends is not None) and about_bridge(tmp_path / "a") == {"by": "me"}
    save_bridge(again, tmp_path / "b", {"by": "me"})
    assert (tmp_path / "b").read_bytes() == before


def test_files_of_other_chains_and_of_others(tmp_path):
    sde, path = DoubleWell(v=1.0), tmp_path / "well"
    grid = torch.linspace(0, 1, 11).double()
    chain = RosenbrockSteps(sde, grid)
    bridge = learn_bridge(chain, torch.ones(1), iterations=2, paths=64)
    save_bridge(bridge, path)
    assert type(load_bridge(path, sde).steps) is RosenbrockSteps
    assert load_bridge(path, chain).steps is chain
    refused = {
        "learned for another process: Brownian": (path, Brownian()),
        "another process: DoubleWell": (path, DoubleWell(v=1.001)),
        "learned on 10 steps from t=0 to t=1, and these are 5": (
            path,
            RosenbrockSteps(sde, grid[::2]),
        ),
        "learned for Terminal\\(\\), not for Coordinates\\(\\[0\\]\\)": (
            path, sde, Coordinates([0]),
        ),
        "none is missing": (tmp_path / "none", sde),
    }  # fmt: skip
    for said, words in refused.items():
        with pytest.raises(KakusanError, match=said):
            load_bridge(*words)
    event = learn_bridge(sde, torch.ones(1), Event(lambda x: x[:, 0] > 0), iterations=1, steps=20,
                         paths=64)  # fmt: skip
    save_bridge(event, path)
    with pytest.raises(KakusanError, match="a function that a file cannot hold"):
        load_bridge(path, sde)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(KakusanError, match="damaged"):
        load_bridge(path, sde)


def test_what_a_file_cannot_build_again_is_refused(tmp_path):
    class Mine(Untilted):
        pass

    sde, small = OrnsteinUhlenbeck(), {"iterations": 1, "steps": 20, "paths": 64}
    own = torch.nn.Module()
    own.w = torch.nn.Parameter(torch.zeros(()))
    own.forward = lambda x, pull, y, levels: own.w * pull
    for bridge in (
        learn_bridge(sde, torch.ones(1), base=Mine(sde), **small),
        learn_bridge(sde, torch.ones(1), net=own, **small),
    ):
        with pytest.raises(KakusanError, match="cannot build again"):
            save_bridge(bridge, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# --- the verb


def test_files_hold_paths_and_weights(kakusan, tmp_path):
    words = ("cell-model", "--end", "2,-0.1", "--guided", *SMALL)
    code, out, err = kakusan(*words, "--out", "a/cell.npz")
    assert code == 0, err
    assert "effective" in out and "towards this end" in out and "a/cell.bridge.safetensors" in out
    with np.load("a/cell.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"times", "paths", "log_weights", "about"}
        assert arrays["paths"].shape == (11, 60, 2) and arrays["log_weights"].shape == (60,)
        assert np.allclose(arrays["paths"][0], [0.1, -0.1])
        assert (arrays["paths"][-1] == [2, -0.1]).all()
        about, paths = json.loads(str(arrays["about"])), arrays["paths"]
        weights = arrays["log_weights"]
    assert about["given"] == "x1 = 2, x2 = -0.1" and about["span"] == [0, 4]
    held = about_bridge("a/cell.bridge.safetensors")
    assert held["ends"] == [2, -0.1] and held["iterations"] == 4 and held["steps"] == 10
    for ending in ("csv", "parquet"):
        again = kakusan(*words, "--out", f"b.{ending}", "--tilt", "a/cell.bridge.safetensors")
        assert again[0] == 0 and "reusing a/cell.bridge.safetensors" in again[1]
    head, *body = (tmp_path / "b.csv").read_text().splitlines()
    table = np.array([[float(v) for v in row.split(",")] for row in body])
    assert head == '"path","log_weight","t","x1","x2"' and len(table) == 11 * 60
    assert np.allclose(table[11:22, 3:], paths[:, 1]) and np.allclose(table[11:22, 1], weights[1])
    import pyarrow.parquet

    assert len(pyarrow.parquet.read_table("b.parquet")) == 11 * 60


def test_ctrl_c_keeps_what_was_learned(kakusan, monkeypatch):
    words = ("double-well", "v=1", "--start", 1, "--end", -1, "--steps", 10, "-n", 60)
    true, updates = Average.update, []

    def impatient(self, model, k):
        updates.append(k)
        if len(updates) == 30:
            raise KeyboardInterrupt
        true(self, model, k)

    monkeypatch.setattr(Average, "update", impatient)
    code, out, err = kakusan(*words)
    assert code == 130 and err.endswith("stopped by Ctrl-C\n")
    assert "double-well.bridge.safetensors keeps what 29 iterations have taught" in out
    code, out, _ = kakusan(*words)
    assert code == 0 and "reusing double-well.bridge.safetensors, learned in" in out


def test_a_tilt_is_reused_where_it_was_learned_for_the_same(kakusan, tmp_path):
    words = ["mine.py:Decay", "rate=1", "--start", "1", *SMALL]
    assert kakusan(*words, "--end", 0.5)[0] == 0
    file = tmp_path / "Decay.bridge.safetensors"
    first = file.read_bytes()
    # one tilt for all ends that paths come to; the numbers are those of the run that learned it
    for end in (0.5, 0.7):
        out = kakusan(*words, "--end", end)[1]
        assert "reusing Decay.bridge.safetensors, learned in " in out, out
        fresh = kakusan(*words, "--end", end, "--fresh", "--tilt", "other")[1]
        kept = [line for line in out.splitlines() if "log p" in line or "x1" in line]
        assert "reusing" not in fresh and all(line in fresh for line in kept)
    assert file.read_bytes() == first
    for change, said in (
        (["--start", "0.9"], "another start: learning anew"),
        (["--steps", "21"], "another number of steps: learning anew"),
        (["--until", "0.9"], "another span of time: learning anew"),
        (["--iterations", "5"], "another number of iterations: learning anew"),
        (["--std", "0.1"], "another observation: learning anew"),
        (["--guided"], "another end: learning anew"),
        (["--fresh"], ""),
    ):
        file.write_bytes(first)
        code, out, err = kakusan(*words, "--end", 0.5, *change)
        assert code == 0 and said in out and "reusing" not in out, (change, out, err)
    file.write_bytes(first)
    assert "another process: learning anew" in kakusan(*words[:1], *words[2:], "--end", 0.5)[1]
    file.write_bytes(first)
    # the same words for another process: its steps tell
    (tmp_path / "mine.py").write_text(MINE.replace("-self.rate * x", "-2 * self.rate * x"))
    assert "another process: learning anew" in kakusan(*words, "--end", 0.5)[1]


def test_other_files_are_not_written_over(kakusan, tmp_path):
    words = ("mine.py:Decay", "--end", 0.5, *SMALL, "--tilt", "mine.py")
    code, out, err = kakusan(*words)
    assert code == 1 and "--fresh writes over it" in err and not out
    assert (tmp_path / "mine.py").read_text() == MINE
    bridge = learn_bridge(OrnsteinUhlenbeck(), torch.ones(1), iterations=1, steps=5, paths=64)
    save_bridge(bridge, tmp_path / "bare")
    code, _, err = kakusan(*words[:-1], "bare")
    assert code == 1 and "does not say what it was learned for" in err


def test_json_is_one_object(kakusan):
    code, out, err = kakusan("ornstein-uhlenbeck", "--end", 0.5, *SMALL, "--json", "--out", "x")
    record = json.loads(out)
    assert code == 0 and not err and record["log_p"].keys() == {"value", "std_error"}
    assert record["y"] == [0.5] and record["span"] == [0, 1] and record["missed"] == 0
    assert record["picture"] == "x.png" and record["tilt"] == "x.bridge.safetensors"
    assert record["middle"]["rows"][0].keys() >= {"mean", "std_error", "std", "free_mean"}
    code, out, _ = kakusan("double-well", "v=5", "--start", 1, "--end", -1, "--steps", 100,
                           "--iterations", 4, "--json")  # fmt: skip
    record = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert code == 0 and record["guided"] and record["free"]["within"] is None


def test_pictures_of_all_kinds(kakusan, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge_charts, "draw", DRAW)
    np.save("big.npy", 1.2 * np.array([[1.0, 0], [-0.5, 0.8], [-0.5, -0.8]]))
    (tmp_path / "starts.csv").write_text("0,0\n0.5,0\n")
    words = {
        "landmarks": ("landmarks", "points=3", "--end", "big.npy"),
        "coordinate": ("brownian", "--start", "starts.csv", "--observe", "x2", "--end", 1),
        "noisy": ("brownian", "--start", "0,0", "--end", "1,0", "--std", 0.2),
        "room": ("lorenz", "--until", 0.1, "--observe", "x1,x3", "--end", "1.5,0.1"),
        "event": ("brownian", "--start", "0,0", "--event", "x2<=-0.5"),
        "series": ("double-well", "v=1", "--start", 1, "--at", "0.25=0.5", "--at", "0.5=0.4"),
    }
    for case, given in words.items():
        code, out, err = kakusan(*given, *SMALL, "--out", f"{case}.png", "--json")
        assert code == 0, (case, err)
        record = json.loads(out)
        assert Image.open(record["picture"]).size[0] > 1000, case
        assert "arrays" not in record
    assert record["span"] == [0, 0.5] and record["y"] == [0.5, 0.4]


def test_ctrl_c_leaves_what_was_there(kakusan, tmp_path, monkeypatch):
    words = ("ornstein-uhlenbeck", "--end", 0.5, *SMALL)
    assert kakusan(*words)[0] == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bridging, "learn_bridge", stopped)
    code, out, err = kakusan(*words, "--fresh")
    assert code == 130 and err == "kakusan: stopped by Ctrl-C\n" and not out
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_help_has_an_example(kakusan):
    code, out, _ = kakusan("--help")
    assert code == 0 and "Example:" in out and "--guided" in out


# --- one sentence for every mistake


def test_mistakes(kakusan, tmp_path):
    np.save(tmp_path / "two.npy", np.ones((2, 2)))
    for words, said in (
        (("ornstein-uhlenbeck",), "what is seen of the paths? say --end"),
        (("dubble-well", "--end", 1), "there is no process 'dubble-well'; did you mean"),
        (("cell-model", "--end", 1), "a state of this process is 2 numbers, and 1 is given: 1"),
        (("cell-model", "--end", "two.npy"), "end in one state, and two.npy holds 2"),
        (("cell-model", "--end", "1,1", "--observe", "x1"), "--observe x1 sees 1 number, and 2"),
        (("cell-model", "--end", "1", "--observe", "x3"), "has no 'x3'; its numbers are x1, x2"),
        (("cell-model", "--end", "1,1", "--observe", "x1,x1"), "observed twice in x1,x1"),
        (("cell-model", "--start", "1", "--end", "1,1"), "and the start has 1"),
        (("double-well", "--end", "nan"), "must be finite, got x = nan"),
        (("double-well", "--end", "abc"), "an end is numbers, as 0.5 or 1,2"),
        (("double-well", "--end", "no.npy"), "cannot read the end from no.npy"),
        (("double-well", "--end", 1, "--std", -1), "--std is at least 0 and finite"),
        (("cir", "--end", -1), "outside the domain x >= 0"),
        (("cir", "--end", 1, "--until", 0), "two different times"),
        (("cir", "--end", 1, "--until", -1), "cannot go from t=0 to t=-1"),
        (("mine.py:turn", "--start", "1,0", "--end", "1,0"), "this process has no noise"),
        (("mine.py:nowhere", "--end", "1"), "does not say where it starts"),
        (("double-well", "--end", 1, "--event", "x>1"), "is all that is seen"),
        (("double-well", "--event", "exit()"), "an event is NAME OP NUMBER"),
        (("double-well", "--event", "y>1"), "has no 'y'; it is one number, x"),
        (("double-well", "--at", "0.5"), "--at is TIME=VALUES"),
        (("double-well", "--at", "0.5=a"), "the values of --at must be numbers"),
        (("double-well", "--at", "2=1", "--end", 1), "--at 2=... is not after t=0 and up to t=1"),
        (("double-well", "--at", "1=1", "--end", 1), "say the same thing twice"),
        (("double-well", "--at", "0.5=1", "--at", "0.5=2"), "--at says a time twice"),
        (("double-well", "--at", "0.5=1", "--until", 1), "nothing is seen after t=0.5"),
        (("double-well", "--end", 1, "-n", 0), "n must be at least 1"),
        (("double-well", "--end", 1, "-n", 10**11), "so many states are 149,757 GiB, and"),
        (("double-well", "--end", 1, "-n", 1), "n must be at least 2"),
        (("double-well", "--end", 1, "--steps", 0), "steps must be at least 1"),
        (("double-well", "--end", 1, "--iterations", 0), "iterations must be at least 1"),
        (("double-well", "--end", 1, "--out", "x.doc"), "written as .png, .npz, .parquet or .csv"),
        (("double-well", "--end", 1, "--out", "mine.py/x.png"), "is no folder to write to"),
        (("double-well", "--end", 1, "--tilt", "."), "cannot write .: it is a folder"),
    ):
        code, out, err = kakusan(*words)
        assert code == 2 and said in err and err.count("\n") == 1 and not out, (words, err)
    assert {p.suffix for p in tmp_path.iterdir() if p.is_file()} == {".py", ".npy"}


def test_failed_work_says_why(kakusan):
    for words, said in (
        (("ornstein-uhlenbeck", "--event", "x>9"), "none of 4,000 free paths ends with x > 9"),
        (("double-well", "--start", 1, "--end", 1, "--steps", 8), "smaller steps: more --steps"),
        (("heston", "--end", "1,0.04"), "the second coordinate) at t="),
        (("fitzhugh-nagumo", "--end", "1,1", "--until", 0.1, "--steps", 1), "noise"),
    ):
        code, out, err = kakusan(*words, "--iterations", 2)
        assert code == 1 and said in err and err.count("\n") == 1, (words, err)
        assert "log p" not in out


def test_requests_from_python_are_refused_too():
    with pytest.raises(UsageError, match="what is seen of the paths"):
        pose(Brownian(), Request(start=torch.zeros(1, 2)))
    with pytest.raises(UsageError, match="observed twice"):
        pose(Brownian(), Request((1.0, 1.0), ("x1", "x1"), start=torch.zeros(1, 2)))
