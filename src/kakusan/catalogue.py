r"""Processes and methods by name: what the command line finds behind a word.

A process is one of the zoo's, in kebab case, or `module:object` or `path/to/file.py:object` of the
user's, where the object is an SDE, a class of them, or a function that returns one. Parameters are
words KEY=VALUE, read as YAML, so that lists and matrices can be written. Nothing but the named
file is run.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor

from kakusan.errors import KakusanError, UsageError
from kakusan.processes.sde import SDE
from kakusan.solvers.solve import Method

# spans of the zoo are those of bridges; these are long enough to see what a process does
_NATURAL = {
    "OrnsteinUhlenbeck": 5.0, "CriticallyDamped": 2.0, "CIR": 5.0, "Jacobi": 5.0, "Heston": 2.0,
    "DoubleWell": 5.0, "Lorenz": 3.0, "FitzHughNagumo": 10.0, "CellModel": 20.0, "Swirl": 5.0,
    "Langevin": 5.0, "Underdamped": 10.0,
}  # fmt: skip
_SPELLED = {"FitzHughNagumo": "fitzhugh-nagumo"}  # one name, not two


def kebab(name: str) -> str:
    """The name of a class as it is written on the command line.

    Example:
        >>> kebab("OrnsteinUhlenbeck"), kebab("CIR"), kebab("RK4")
        ('ornstein-uhlenbeck', 'cir', 'rk4')
    """
    return _SPELLED.get(name) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def zoo() -> dict[str, type[SDE]]:
    """The processes with names of their own."""
    from kakusan.processes import zoo

    found = (c for c in vars(zoo).values() if isinstance(c, type) and issubclass(c, SDE))
    return {kebab(c.__name__): c for c in sorted(found, key=lambda c: kebab(c.__name__))}


def methods() -> dict[str, type[Method]]:
    """The methods of the package that take any process and need no settings."""
    package = importlib.import_module("kakusan")
    found = {}
    for name in dir(package):
        held = getattr(package, name)
        if not isinstance(held, type) or not issubclass(held, Method) or inspect.isabstract(held):
            continue
        # samplers of diffusion models are methods too, but want the reverse of a LinearSDE
        if held.__module__.endswith(".exponential") or _required(inspect.signature(held)):
            continue
        found[kebab(name)] = held
    return found


def named(word: str, known: Iterable[str], kind: str) -> str:
    """The one of the known names that is meant; hyphens and capitals do not count.

    Raises:
        UsageError: If there is none, naming the nearest.

    Example:
        >>> named("RK4", ["heun", "rk4"], "method")
        'rk4'
    """
    plain = {re.sub("[-_ ]", "", k).lower(): k for k in known}
    if (key := re.sub("[-_ ]", "", word).lower()) in plain:
        return plain[key]
    near = difflib.get_close_matches(key, plain, 1, 0.5)
    many = f"{kind}es" if kind.endswith("s") else f"{kind}s"
    every = f"the {many} are {', '.join(plain.values())}"
    raise UsageError(
        f"there is no {kind} {word!r}; {f'did you mean {plain[near[0]]}?' if near else every}"
    )


# --- a process behind its name


def resolve(name_or_path: str, words: list[str] | None = None) -> SDE:
    """The process behind a name, made with parameters.

    Arguments:
        name_or_path: A name of the zoo, `module:object` or `path/to/file.py:object`; the current
            folder and that of the file can be imported from.
        words: Parameters, KEY=VALUE. A process of the zoo that is given no span gets one that is
            long enough to see what it does.

    Raises:
        UsageError: If there is no such module, object or parameter, or the constructor refuses.
        KakusanError: If the user's own file fails.

    Example:
        >>> resolve("cir", ["rate=2", "mean=[1, 2]"]).span
        (0.0, 5.0)
    """
    values = dict(_read(word) for word in words or [])
    if ":" in name_or_path:
        return _made(_object(name_or_path), name_or_path, values)
    if name_or_path.endswith(".py"):
        raise UsageError(f"say which object of {name_or_path} is the process: {name_or_path}:NAME")
    processes = zoo()
    name = named(name_or_path, processes, "process")
    cls = processes[name]
    if cls.__name__ in _NATURAL:
        values = {"span": (0.0, _NATURAL[cls.__name__]), **values}
    return _made(cls, name, values)


def _made(held: Any, name: str, values: dict[str, Any]) -> SDE:
    """The process that an object is, or makes of the parameters."""
    if isinstance(held, SDE):
        if values:
            raise UsageError(
                f"{name} is a process already, so {', '.join(values)} cannot be set; name its "
                "class, or a function that makes it"
            )
        return held
    if isinstance(held, type) and not issubclass(held, SDE) or not callable(held):
        kind = (
            f"the class {held.__name__}"
            if isinstance(held, type)
            else f"of type {type(held).__name__}"
        )
        raise UsageError(
            f"{name} is {kind}, not a kakusan.SDE, a class of them, or a function that returns one"
        )
    values = _arguments(held, name, values)
    try:
        made = held(**values)
    except (KakusanError, ValueError, TypeError) as error:
        raise UsageError(f"{name} refuses its parameters: {_words(error)}") from error
    except Exception as error:
        raise KakusanError(f"{name} fails{_where(error)}: {_words(error)}") from error
    if not isinstance(made, SDE):
        raise UsageError(
            f"what {name} returns is of type {type(made).__name__}, not a kakusan.SDE"
        )
    return made


def _arguments(maker: Callable[..., Any], name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the signature wants them."""
    signature = inspect.signature(maker)
    takes = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in set(values) - set(takes):
            near = difflib.get_close_matches(key, takes, 1, 0.4)
            every = f"it takes {', '.join(takes)}" if takes else "it takes none"
            hint = f"did you mean {near[0]}?" if near else every
            raise UsageError(f"{name} has no parameter {key!r}; {hint}")
    if missing := [k for k in _required(signature) if k not in values]:
        if "energy" in missing:
            raise UsageError(_wants_energy(name, maker))
        raise UsageError(f"{name} needs {', '.join(f'{k}=VALUE' for k in missing)}")
    return {k: _fitted(v, takes[k]) if k in takes else v for k, v in values.items()}


def _wants_energy(name: str, maker: Callable[..., Any]) -> str:
    cls = getattr(maker, "__name__", name)
    return (
        f"{name} needs an energy, which is a function: write it in a file, say well.py, as "
        f"`from kakusan.processes.zoo import {cls}; "
        f"well = {cls}(lambda x: ((x**2 - 1) ** 2).sum(1), dim=1)`, and name well.py:well"
    )


def _required(signature: inspect.Signature) -> list[str]:
    return [
        k
        for k, p in signature.parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _fitted(value: Any, parameter: inspect.Parameter) -> Any:
    """A YAML value as an annotation reads: 1 may be a float, a list a tensor or a tuple."""
    told = parameter.annotation
    kinds = set(re.findall(r"\w+", told if isinstance(told, str) else str(told)))
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kinds - {"int"}:
        return value if "int" in kinds else float(value)
    if isinstance(value, list) and "tuple" in kinds:
        return tuple(float(v) if isinstance(v, int) else v for v in value)
    if isinstance(value, list) and "Tensor" in kinds:
        with contextlib.suppress(TypeError, ValueError):
            return torch.tensor(value, dtype=torch.float64)
    return value


def _read(word: str) -> tuple[str, Any]:
    key, mark, text = word.partition("=")
    if not mark or not key.strip():
        raise UsageError(f"{word!r} is no parameter; write KEY=VALUE, as sigma=0.5 or mean=[0,1]")
    try:
        return key.strip(), numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UsageError(f"the value of {key} is no YAML: {text!r}") from None


def numbers(value: Any) -> Any:
    """A YAML value in which 1e-3 is a number, as people mean it and YAML does not.

    Example:
        >>> numbers(["1e-3", 2])
        [0.001, 2]
    """
    if isinstance(value, list):
        return [numbers(v) for v in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


# --- the user's own files


def _object(path: str) -> Any:
    """The object of `module:object` or `path/to/file.py:object`."""
    place, _, name = path.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    held: Any = module
    for part in name.split("."):
        known = [k for k in vars(held) if not k.startswith("_")] if hasattr(held, part) else None
        if known is None:
            have = [k for k, v in vars(held).items() if not k.startswith("_") and _may_be(v)]
            near = difflib.get_close_matches(part, have, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it holds {', '.join(have) or 'none'}"
            raise UsageError(f"there is no {name!r} in {place}; {hint}")
        held = getattr(held, part)
    return held


def _may_be(value: Any) -> bool:
    """Whether an object of a module may be a process."""
    if isinstance(value, type):
        return issubclass(value, SDE) and not inspect.isabstract(value)
    return isinstance(value, SDE) or inspect.isfunction(value)


def _module(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise UsageError(
                    f"there is no module {name!r} here or among what is installed; a file is "
                    f"named with its ending, as {name.replace('.', '/')}.py:object"
                ) from None
            raise KakusanError(f"{name} fails{_where(error)}: {_words(error)}") from error
        except Exception as error:
            raise KakusanError(f"{name} fails{_where(error)}: {_words(error)}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    # under a name of its own, so that it hides no module of the same name
    name = f"kakusan_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _importable(path.resolve().parent, Path.cwd()):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise KakusanError(f"{path} fails{_where(error)}: {_words(error)}") from error
    return module


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Folders from which modules can be imported; later too, for imports inside functions."""
    for folder in map(str, reversed(folders)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    importlib.invalidate_caches()
    yield


def _where(error: BaseException) -> str:
    """The line of the user's file where an error was raised, in words."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    own = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if "importlib" not in f.filename and own not in f.filename]
    return f" in line {theirs[-1].lineno} of {Path(theirs[-1].filename).name}" if theirs else ""


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no further words"
    return text if isinstance(error, KakusanError) else f"{type(error).__name__}: {text[:300]}"


# --- the list


def listing() -> list[dict[str, Any]]:
    """Name, equation, parameters and default span of each process of the zoo."""
    rows = []
    for name, cls in zoo().items():
        takes = inspect.signature(cls).parameters
        given = {k: None if p.default is p.empty else p.default for k, p in takes.items()}
        given.pop("span", None)
        required = _required(inspect.signature(cls))
        span = (0.0, _NATURAL[cls.__name__]) if cls.__name__ in _NATURAL else None
        rows.append({"name": name, "equation": equation(cls), "parameters": given,
                     "required": required,
                     "span": span or takes["span"].default})  # fmt: skip
    return rows


def table() -> str:
    """The list for people."""
    lines = []
    for row in listing():
        lines.append(f"{row['name']:22}{row['equation']}")
        given = [
            f"{k}=..." if k in row["required"] else f"{k}={_short(v)}"
            for k, v in row["parameters"].items()
        ]
        lines.append(f"{'':22}{'  '.join(given)}   until {row['span'][1]:g}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def described(sde: SDE, name: str = "") -> str:
    """A process in words: its name and its parameters, without the span.

    Example:
        >>> described(resolve("double-well"), "double-well")
        'double-well, v=5, dim=1'
    """
    fields = getattr(type(sde), "__dataclass_fields__", {})
    held = {k: getattr(sde, k, None) for k in fields if k != "span" and not k.startswith("_")}
    told = []
    for key, value in held.items():
        value = value.tolist() if isinstance(value, Tensor) and value.numel() <= 9 else value
        if value is not None and not isinstance(value, Tensor) and not callable(value):
            told.append(f"{key}={_short(value)}")
    return ", ".join([name or type(sde).__name__, *told])


def equation(cls: type) -> str:
    """The equation in the docstring of a process, as one line of plain text.

    Example:
        >>> from kakusan.processes.zoo import CIR
        >>> equation(CIR)
        'dX = κ (θ - X) dt + σ √X dW'
    """
    doc = inspect.getdoc(cls) or ""
    blocks = re.findall(r"\.\. math:: (.*?)(?:\n\n|$)", doc, re.S)
    inline = re.findall(r":math:`([^`]*)`", doc)
    found = [b for b in [*blocks, *inline] if re.search(r"d[A-Zxyzqpv]\S* *=", b)]
    return ",  ".join(plain(b) for b in found)


def plain(latex: str) -> str:
    r"""A short formula of LaTeX's as plain text.

    Example:
        >>> plain(r"\tfrac{1}{\chi} (x - x^3) \, dt + \sqrt{2 T} \, dW_1")
        '1/χ (x - x³) dt + √(2 T) dW₁'
    """
    text = " ".join(latex.replace("\\tfrac12", "1/2").split()).rstrip(" .")
    half = r"\{([^{}]*)\}"
    text = re.sub(rf"\\t?frac{half}{half}", lambda m: f"{_held(m[1])}/{_held(m[2])}", text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", lambda m: f"√{_held(m[1])}", text)
    text = re.sub(r"\\sqrt ", "√", text).replace("\\cdot", "·").replace("\\sum", "Σ")
    text = re.sub(r"\\q?quad|\\[,;!]|\\(?:big|Big)", " ", text).replace("\\nabla", "∇")
    text = re.sub(r"\\mathrm\{(\w+)\}", r"\1", text.replace("\\top", "T"))
    text = re.sub(r"\\(\w+?)(?=[_^\W])", _greek, text)
    end = r"\{?([\w-]+?)\}?(?=[^\w}-]|$|_)"
    text = re.sub(rf"\^{end}", lambda m: m[1].translate(_UP), text)
    text = re.sub(rf"_{end}", lambda m: m[1].translate(_DOWN), text)
    return re.sub(r"([\[(∇]) ", r"\1", re.sub(r" +", " ", text)).replace(" ]", "]").strip()


_UP = str.maketrans("0123456789-T", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ")
_DOWN = str.maketrans("0123456789ijtϕφ", "₀₁₂₃₄₅₆₇₈₉ᵢⱼₜᵩᵩ")


def _held(text: str) -> str:
    return f"({text})" if re.search(r"[ +*/-]|\d\w", text) else text


def _greek(found: re.Match[str]) -> str:
    word = found[1].replace("lambda", "lamda")
    size = "SMALL" if word.islower() else "CAPITAL"
    try:
        return unicodedata.lookup(f"GREEK {size} LETTER {word.upper()}")
    except KeyError:
        return word
