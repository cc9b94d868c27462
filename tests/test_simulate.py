"""`kakusan simulate`: processes by name, statistics over all paths, files, and every mistake."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kakusan import SDE, KakusanError, Scale, UsageError, catalogue, launch, simulation
from kakusan.cli import _run
from kakusan.processes import zoo
from kakusan.simulation import Request, resolve, simulate

MINE = """
import torch
from kakusan import SDE, Scale, Zero
from kakusan.processes.zoo import Langevin

class Decay(SDE):
    def __init__(self, rate: float = 1.0, A: "torch.Tensor | None" = None):
        self.rate, self.A = rate, A
    def drift(self, x, t): return -self.rate * x
    def diffusion(self, x, t): return Scale(x.new_tensor(0.1))

class Needy(Decay):
    def __init__(self, depth): super().__init__(depth)

class Explosive(Decay):
    start = 2.0
    def drift(self, x, t): return x**5

class Wide(Decay):
    start = [1.0, 2.0]
    def drift(self, x, t): return x @ torch.ones(3, 3)

class Bad(Decay):
    def __init__(self): raise RuntimeError("no luck")

decay = Decay(2.0)
well = Langevin(lambda x: ((x**2 - 1) ** 2).sum(1), dim=1)
turn = SDE.of(lambda x, t: torch.stack([x[:, 1], -x[:, 0]], 1), Zero())
number = 3
def make(k: float = 1): return 5 if k == 2 else Decay(k)
"""


@pytest.fixture
def kakusan(capsys, tmp_path, monkeypatch):
    """Runs `kakusan simulate` in a folder with mine.py: (exit code, standard output, error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "fails.py").write_text("import os\n\nx = 1 / 0\n")

    def run(*words):
        code = _run(["simulate", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


# --- names


def test_every_process_of_the_zoo_has_a_name_and_a_line():
    named = catalogue.zoo()
    assert set(named.values()) == {
        c for c in vars(zoo).values() if isinstance(c, type) and issubclass(c, SDE)
    }
    for row in catalogue.listing():
        assert "d" in row["equation"] and "\\" not in row["equation"], row
        assert not set(row["equation"]) & set("{}^_"), row
    for name, cls in named.items():
        if "energy" not in cls.__init__.__annotations__:
            sde = resolve(name)
            assert type(sde) is cls and sde.span[1] > 0, name


def test_names_may_be_spelled_in_several_ways():
    for word in ("fitzhugh-nagumo", "FitzHughNagumo", "fitz_hugh_nagumo"):
        assert isinstance(resolve(word), zoo.FitzHughNagumo), word


def test_parameters_are_read_as_their_annotations_say(tmp_path):
    ou = resolve("ornstein-uhlenbeck", ["rate=[[1,0],[0,2]]", "sigma=1e-1", "span=[0,3]"])
    assert isinstance(ou, zoo.OrnsteinUhlenbeck) and ou.span == (0.0, 3.0)
    assert ou.sigma == 0.1 and torch.equal(
        torch.as_tensor(ou.rate), torch.diag(torch.tensor([1.0, 2.0])).double()
    )
    (tmp_path / "own.py").write_text(MINE)
    decay = resolve(f"{tmp_path}/own.py:Decay", ["rate=2", "A=[[1,2]]"])
    assert isinstance(decay.rate, float) and decay.A.dtype == torch.float64
    assert resolve(f"{tmp_path}/own.py:make", ["k=3"]).rate == 3.0
    assert isinstance(resolve(f"{tmp_path}/own.py:turn"), SDE)
    assert isinstance(resolve("kakusan.processes.zoo:CIR", ["rate=2"]), zoo.CIR)


def test_list(kakusan):
    code, out, _ = kakusan("--list")
    assert code == 0 and "dX = κ (θ - X) dt + σ √X dW" in out and "rate=1  mean=1" in out
    code, out, _ = kakusan("--list", "--json")
    assert {row["name"] for row in json.loads(out)} == set(catalogue.zoo())


def test_help_has_an_example(kakusan):
    code, out, _ = kakusan("--help")
    assert code == 0 and "Example:" in out and "[default: 10000" in out


# --- what comes out


def test_statistics_are_those_of_the_closed_form():
    n = 4000
    for name, words in (
        ("ornstein-uhlenbeck", ["rate=[[1,2],[-2,1]]"]),
        ("geometric-brownian", []),
        ("cir", ["sigma=0.3"]),
    ):
        sde = resolve(name, words)
        found = simulate(sde, Request(n=n, steps=250, keep=5))
        assert found.exact_mean is not None and found.exact_std is not None
        assert torch.allclose(found.times, torch.linspace(0, sde.span[1], 6).double())
        h = sde.span[1] / 250
        wrong = (found.mean - found.exact_mean).abs()
        # Euler's weak error is of the order of h
        assert (wrong <= 4 * found.exact_std / n**0.5 + h).all(), name
        assert torch.allclose(
            found.std[1:], found.exact_std[1:], rtol=4 / (2 * n) ** 0.5 + 2 * h
        ), name


def test_quantiles_are_torch_s():
    x = torch.randn(1001, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = (0.0, 0.05, 0.333, 0.5, 1.0)
    theirs = torch.quantile(x, torch.tensor(levels).double(), 0)
    assert torch.allclose(simulation.quantiles(x, levels), theirs)
    found = simulate(resolve("brownian"), Request(n=33, steps=10, paths=33, quantiles=levels))
    theirs = torch.quantile(found.paths, torch.tensor(levels).double(), 1).transpose(0, 1)
    assert torch.allclose(found.quantiles, theirs)
    assert torch.allclose(found.mean, found.paths.mean(1))
    assert torch.allclose(found.std, found.paths.std(1))


def test_twice_the_steps_are_finer_steps_along_the_same_paths():
    for span in ((0.0, 2.0), (3.0, 4.5)):
        sde = resolve("ornstein-uhlenbeck")
        ends = [
            simulate(sde, Request(n=20, steps=s, span=span, keep=1)).paths[-1]
            for s in (125, 250, 4000)
        ]
        away = [(x - ends[-1]).abs().max() for x in ends]
        assert away[1] < 0.75 * away[0] < 0.05, away
    a, b = (simulate(sde, Request(n=n, steps=10)) for n in (7, 20))
    assert torch.equal(a.paths, b.paths[:, :7])
    other = simulate(sde, Request(n=7, steps=10, seed=1))
    assert not torch.equal(a.paths[1:], other.paths[1:])


def test_only_kept_paths_are_kept_and_starts_take_turns():
    starts = torch.tensor([[0.0], [10.0]])
    found = simulate(resolve("brownian"), Request(n=5, steps=50, keep=10, paths=3, start=starts))
    assert found.paths.shape == (11, 3, 1) and found.paths[0, :, 0].tolist() == [0, 10, 0]
    assert found.exact_mean is not None and found.exact_std is not None
    assert torch.allclose(found.exact_mean, torch.tensor(4.0).double())
    # between the starts, and the variance of the motion beside it
    assert torch.allclose(found.exact_std[:, 0] ** 2, 24 + found.times)


def test_a_domain_is_kept_by_default_where_a_closed_form_does():
    words = [w for w in ("splitting", "exact") if w in catalogue.methods()]
    found = simulate(resolve("cir"), Request(n=10, steps=400))
    assert found.request.method == [*words, "euler-maruyama"][0]
    found = simulate(resolve("lorenz"), Request(n=10, steps=500))
    assert found.request.method == "euler-maruyama"


def test_files(kakusan, tmp_path):
    code, out, _ = kakusan(
        "double-well",
        "v=1",
        "-n",
        300,
        "--steps",
        20,
        "--until",
        1,
        "--paths",
        4,
        "--out",
        "a/well.npz",
    )
    assert code == 0 and "mean ± std. error" in out and "a/well.npz" in out
    with np.load(tmp_path / "a/well.npz", allow_pickle=False) as arrays:
        assert arrays["paths"].shape == (21, 4, 1) and arrays["quantiles"].shape == (21, 5, 1)
        assert arrays["mean"].shape == (21, 1) and json.loads(str(arrays["about"]))["n"] == 300
        paths, times = arrays["paths"], arrays["times"]
    Image.open(tmp_path / "a/well.png").load()
    for ending in ("csv", "parquet"):
        words = ("double-well", "v=1", "-n", 300, "--steps", 20, "--until", 1, "--paths", 4)
        assert kakusan(*words, "--out", f"b.{ending}")[0] == 0
    head, *body = (tmp_path / "b.csv").read_text().splitlines()
    table = np.array([[float(v) for v in row.split(",")] for row in body])
    assert head == '"path","t","x1"' and len(table) == 84
    assert np.allclose(table[:21, 1], times) and np.allclose(table[21:42, 2], paths[:, 1, 0])
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(tmp_path / "b.parquet").column_names == ["path", "t", "x1"]
    (tmp_path / "folder").mkdir()
    assert kakusan("brownian", "-n", 20, "--steps", 4, "--out", "folder")[0] == 0
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {"brownian.png", "brownian.npz"}


def test_json_is_one_object(kakusan):
    code, out, err = kakusan(
        "ornstein-uhlenbeck", "-n", 100, "--steps", 10, "--json", "--out", "x"
    )
    record = json.loads(out)
    assert code == 0 and not err and record["end"][0].keys() >= {"mean", "std_error", "exact_mean"}
    assert record["picture"] == "x.png" and record["steps"] == 10 and record["span"] == [0, 5]


def test_start_files(kakusan, tmp_path):
    starts = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.save("x.npy", starts)
    np.savez("x.npz", x=starts)
    (tmp_path / "x.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    (tmp_path / "y.csv").write_text("1,2,3\n4,5,6\n")
    sde = resolve("lorenz")
    for name in ("x.npy", "x.npz", "x.csv", "y.csv"):
        assert launch.read_start(name, sde).tolist() == starts.tolist(), name
    code, out, _ = kakusan("lorenz", "--start", "x.npy", "--steps", 4, "--until", 0.01)
    assert code == 0 and ": 2 paths" in out
    np.save("line.npy", np.arange(5.0))
    assert launch.read_start("line.npy", resolve("double-well")).shape == (5, 1)


def test_pictures_of_all_kinds(kakusan, tmp_path):
    for words in (
        ("lorenz", "-n", 20, "--until", 0.1),
        ("landmarks", "points=3", "-n", 9),
        ("mine.py:turn", "--start", "1,0", "-n", 1),
        ("mine.py:well", "-n", 50, "--quantiles", "0.1,0.9", "--paths", 0),
    ):
        code, out, err = kakusan(*words, "--steps", 20, "--out", "x.png", "--json")
        assert code == 0, (words, err)
        assert Image.open(json.loads(out)["picture"]).size[0] > 1000, words


# --- one sentence for every mistake


def test_mistakes(kakusan, tmp_path):
    np.save(tmp_path / "nan.npy", np.array([[0.0], [np.nan]]))
    for words, said in (
        ((), "which process? kakusan simulate --list"),
        (("dubble-well",), "there is no process 'dubble-well'; did you mean double-well?"),
        (("zzz",), "the processes are brownian, cell-model"),
        (("cir", "rte=2"), "cir has no parameter 'rte'; did you mean rate?"),
        (("cir", "rate=-1"), "rate must be larger than 0, got -1.0"),
        (("cir", "rate"), "'rate' is no parameter; write KEY=VALUE"),
        (("cir", "rate=[1"), "the value of rate is no YAML"),
        (("langevin",), "write it in a file, say well.py"),
        (("lorenz", "--start", "1,2"), "3 numbers, as 1,1,1, and the start has 2"),
        (("cir", "--start", "-1"), "outside the domain x >= 0"),
        (("cir", "--start", "x"), "a start is numbers"),
        (("cir", "--start", "no.npy"), "cannot read the start from no.npy: No such file"),
        (("brownian", "--start", "nan.npy"), "row 1 is [nan]"),
        (("cir", "--method", "eulermaryama"), "did you mean euler-maruyama?"),
        (("cir", "--engine", "x"), "the engines are eager, compiled"),
        (("cir", "--dtype", "float16"), "there is no dtype 'float16'"),
        (("cir", "--span", "1"), "a span is START,END"),
        (("cir", "--span", "5,0"), "cannot go from t=5 to t=0"),
        (("cir", "--until", "0"), "two different times"),
        (("cir", "--until", "1", "--span", "0,1"), "choose one"),
        (("cir", "-n", "0"), "n must be at least 1"),
        (("cir", "--quantiles", "2"), "quantiles lie between 0 and 1"),
        (("cir", "--out", "x.doc"), "written as .png, .npz, .parquet or .csv, not 'x.doc'"),
        (("nomodule:x",), "there is no module 'nomodule'"),
        (("none.py:x",), "there is no file none.py"),
        (("mine.py",), "which object of mine.py"),
        (("mine.py:decya",), "did you mean decay?"),
        (("mine.py:number",), "mine.py:number is of type int, not a kakusan.SDE"),
        (("mine.py:Needy",), "needs depth=VALUE"),
        (("mine.py:make", "k=2"), "of type int, not a kakusan.SDE"),
        (("mine.py:decay", "rate=1"), "is a process already"),
        (("mine.py:decay",), "does not say where it starts"),
        (("mine.py:Wide",), "fails on states of shape (2, 2)"),
    ):
        code, out, err = kakusan(*words)
        assert code == 2 and said in err and err.count("\n") == 1 and not out, (words, err)
    assert not list(tmp_path.glob("*.png"))


def test_failed_work_says_where(kakusan):
    for words, said in (
        (("mine.py:Bad",), "fails in line 24 of mine.py: RuntimeError: no luck"),
        (("fails.py:x",), "fails in line 3 of fails.py: ZeroDivisionError"),
        (("mine.py:Explosive", "--steps", 400), " of 400 of EulerMaruyama)"),
        (("heston", "--method", "euler-maruyama"), "left the domain v >= 0"),
    ):
        code, _, err = kakusan(*words, "-n", 3000)
        assert code == 1 and said in err and err.count("\n") == 1, (words, err)


def test_python_mistakes():
    with pytest.raises(UsageError, match="the start has 2"):
        simulate(resolve("lorenz"), Request(start=torch.ones(1, 2)))
    noise = SDE.of(lambda x, t: x * float("nan"), Scale(1.0))
    with pytest.raises(KakusanError, match="no longer finite"):
        simulate(noise, Request(n=3, start=torch.ones(1, 1)))
