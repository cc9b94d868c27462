"""The guide is true: names and links exist, commands parse, and its Python runs."""

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer

from kakusan import DiffusionModel, bridges, learn
from kakusan.cli import app
from kakusan.objectives.malliavin import Window
from kakusan.solvers.rosenbrock import RosenbrockSteps
from kakusan.training.config import configure

ROOT = Path(__file__).parents[1]
PAGES = [
    p for p in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md") if p.read_text().strip()
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def functions_in(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def found(name):
    """The object of a dotted name: the longest module in it, then attributes."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


# --- the map


def test_every_test_on_the_map_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/map.md").read_text())
    wrong = [f"{file}::{name}" for file, name in named if name not in functions_in(ROOT / file)]
    assert len(named) > 50 and not wrong, wrong


def test_every_name_on_the_map_imports():
    names = set(re.findall(r"`(kakusan(?:\.\w+)+)`", (ROOT / "docs/map.md").read_text()))
    assert len(names) > 50
    for name in names:
        assert found(name) is not None, name


# --- pages


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if "://" in file:
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in anchors, target


def commands(page):
    """The kakusan commands on a page, as words; of a console, the lines that were typed."""
    typed = [x[2:] for b in blocks(page, "console") for x in b.splitlines() if x[:2] == "$ "]
    written = [x for b in blocks(page, "sh", "bash") for x in b.replace("\\\n", " ").splitlines()]
    for line in typed + written:
        for part in re.split("&&|;", line):
            words = shlex.split(part, comments=True)
            if len(words) > 1 and Path(words[0]).name == "kakusan" and words[1][0] != "-":
                yield words[1:]


@each_page
def test_commands_on_the_page_parse(page):
    """Verbs, options and settings exist; nothing is run."""
    verbs = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for verb, *words in commands(page):
        settings = verbs[verb].make_context(verb, words).params.get("overrides") or []
        # one page shows what a typing error says
        configure(overrides=[s for s in settings if s != "train.stpes=10"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, as small as can be, that pages may load."""
    folder = tmp_path_factory.mktemp("docs") / "digits"
    config = tiny(configure())
    DiffusionModel.fit(config, out=folder, quiet=True)
    return folder


def tiny(config):
    train = {"steps": 2, "batch": 16, "precision": "float32", "layout": "contiguous"}
    model = {"width": 16, "multipliers": [1, 1], "blocks": 1}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "model": config.model.model_copy(update=model),
        }
    )


@each_page
def test_python_on_the_page_runs(page, run, tmp_path, monkeypatch):
    """All blocks of a page in one go, with tiny networks, few steps and few held-out points."""
    code = [b for b in blocks(page, "python") if not b.lstrip().startswith("# not run")]
    if not code:
        return
    fit, evaluate = DiffusionModel._fit, DiffusionModel.evaluate
    learn_score, learn_bridge = learn.learn_score, bridges.learn_bridge
    sample, measured_score = bridges.Bridge.sample, bridges.Bridge.measured_score

    def small_fit(cls, config, *rest, **options):
        return fit(tiny(config), *rest, **options)

    def small_evaluate(self, n=None, **options):
        return evaluate(self, 40, **{**options, "limit": 40, "steps": 2})

    def small_learn_score(*args, **options):
        return learn_score(*args, **{**options, "steps": 10, "iterations": 4, "paths": 64})

    def small_learn_bridge(process, *args, **options):
        if isinstance(process, RosenbrockSteps):  # to choose a window takes many of its steps
            options["weights"] = Window(0.05)
        options |= {"iterations": 2, "paths": 64, "times": 2}
        return learn_bridge(process, *args, **options)

    def small_sample(self, x0, y, n=50, **options):
        return sample(self, x0, y, min(n, 50), **options)

    def small_measured_score(self, x, t, y, n=50, **options):
        return measured_score(self, x, t, y, min(n, 50), **options, weights=Window(0.05))

    monkeypatch.setattr(learn, "learn_score", small_learn_score)
    monkeypatch.setattr(bridges, "PILOT", 64)
    monkeypatch.setattr(bridges, "PAIRS", 4)
    monkeypatch.setattr(bridges.Bridge, "measured_score", small_measured_score)
    monkeypatch.setattr(bridges, "learn_bridge", small_learn_bridge)
    monkeypatch.setattr(bridges.Bridge, "sample", small_sample)
    monkeypatch.setattr(DiffusionModel, "_fit", classmethod(small_fit))
    monkeypatch.setattr(DiffusionModel, "evaluate", small_evaluate)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "digits")
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    for number, block in enumerate(code):
        if "from arch" in block and importlib.util.find_spec("arch") is None:
            pytest.skip("blocks that need the data of arch, from the test extra, were not run")
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)
