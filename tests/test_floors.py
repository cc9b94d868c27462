"""Imports go down the floors, and `import kakusan` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import kakusan

ROOT = Path(kakusan.__file__).parent
FLOORS = {
    "errors": -1, "core": 0, "processes": 1, "solvers": 2, "models": 3, "objectives": 3,
    "inference": 4, "training": 5, "pictures": 6, "pipeline": 6, "learn": 6, "certification": 6,
    "catalogue": 6, "sampling": 6, "densities": 6, "judging": 6, "launch": 6, "simulation": 6,
    "charts": 6, "bridges": 6, "bridge_request": 6, "bridging": 6, "bridge_charts": 6,
    "bridge_luck": 6, "conditioning": 6, "learned_conditions": 6, "condition_files": 6,
    "scenes": 6, "verbs": 7, "verbs_bridge": 7, "verbs_condition": 7, "cli": 7,
    "__main__": 8, "__init__": 9,
}  # fmt: skip


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_imports_go_down_the_floors():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in _imports(path):
            if name.startswith("kakusan.") and _room(name) != room:
                if FLOORS[_room(name)] > FLOORS[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_no_module_reads_pickle():
    for path in ROOT.rglob("*.py"):
        assert not {"pickle", "torchvision", "torch.load", "torch.save"} & set(_imports(path)), (
            path
        )
        assert "torch.load(" not in path.read_text(), path


def test_import_brings_only_torch():
    code = (
        "import torch, sys; before = set(sys.modules); import kakusan;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"sklearn", "matplotlib", "scipy", "ot", "pyarrow", "PIL", "pydantic", "rich", "typer"}
    assert not heavy & set(out.stdout.split()), out.stdout


def test_every_public_name_opens():
    for name in [*dir(kakusan), *kakusan._ROOMS]:
        assert getattr(kakusan, name) is not None, name
