"""Whether drift and diffusion are functions of (state, time), one sample at a time.

Everything else rests on this: every solver here runs batches, with one time for all or one for
each, in the dtype of the state, and may call a field twice at one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kakusan.certification.case import F64, Case
from kakusan.certification.certificate import Row, judged, skipped
from kakusan.core.noise import generator
from kakusan.core.operators import Operator
from kakusan.core.types import Field
from kakusan.errors import KakusanError

TOLERANCE = 1e-9  # matrix products round differently in batches of another size
APART = ("samples apart", "a time each", "repetition")
Found = dict[str, list[tuple[str, bool]]]


def conformance(case: Case) -> list[Row]:
    """The rows on shapes, dtypes, numbers, samples, times and repetition.

    Those of `APART` are skipped where not even float64 batches with one time for all work, and
    then no other check can be made.
    """
    found: Found = {"shapes": [], "dtypes": [], "finite": []}
    single: Found = {check: [] for check in found}
    calls = 0
    for name, field, x, t in _occasions(case):
        calls += 1
        _asked(single if x.dtype is torch.float32 else found, name, field, x, t)
    # a process that refuses float32 aloud is not wrong in it; one that answers in float64 is
    refuses = any("raises" in wrong for wrong, _ in single["shapes"]) and not found["shapes"]
    for check in () if refuses else found:
        found[check] += single[check]
    rows = [
        judged(check, not wrong, f"{len(wrong)} of {calls} calls", "0 wrong",
               wrong[0][0] if wrong else "", len(wrong))
        for check, wrong in found.items()
    ]  # fmt: skip
    if refuses and rows[1].verdict == "pass":
        rows[1] = Row("dtypes", "pass", "float64 only", "0 wrong", single["shapes"][0][0])
    if any(essential for wrong in found.values() for _, essential in wrong):
        why = "drift and G must first give finite states for float64 states"
        return rows + [skipped(check, why) for check in APART]
    return [*rows, _samples(case), _times(case), _repetition(case)]


def fields(case: Case) -> dict[str, Field]:
    """What a process computes, as functions of state and time."""

    def kicked(x: Tensor, t: Tensor) -> Tensor:
        G = case.sde.diffusion(x, t)
        if not isinstance(G, Operator):
            raise KakusanError(
                f"diffusion gives a {type(G).__name__}, not an operator: wrap it in Scale(g) for "
                "one number, Diagonal(g) for one a coordinate, Dense(G) for matrices (B, d, m)"
            )
        if G.deterministic:
            return torch.zeros_like(x)
        return G.kick(torch.zeros_like(x), _noise(case, x))

    return {
        "drift": case.sde.drift, "G dw": kicked, "gram_divergence": case.sde.gram_divergence,
    }  # fmt: skip


def _noise(case: Case, x: Tensor) -> Tensor:
    """The same noise for every sample, in every batch."""
    shape = case.sde.noise_shape(x)
    z = torch.randn((1, *shape[1:]), generator=generator(case.seed, 2), dtype=F64)
    return z.to(x.dtype).expand(shape)


def _occasions(case: Case) -> Iterator[tuple[str, Field, Tensor, Tensor]]:
    """Field by field: batches of 1 and 5, in two dtypes, with one time or one for each."""
    for name, field in fields(case).items():
        for dtype in (F64, torch.float32):
            for B in (1, 5):
                x = case.near(B).to(dtype)
                yield name, field, x, case.t(0.3)
                yield name, field, x, case.grid(6)[1 : B + 1]


def _asked(found: Found, name: str, field: Field, x: Tensor, t: Tensor) -> None:
    """Notes what is wrong with one call, and whether all other checks need it."""
    dtype, essential = str(x.dtype).removeprefix("torch."), x.dtype is F64 and not t.ndim
    where = f" (in {dtype}, {len(x)} samples, t of shape {tuple(t.shape)})"
    try:
        out = field(x, t)
    except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
        found["shapes"].append((f"{name} raises {told(error)}{where}", essential))
        return
    if out.shape != x.shape:
        wrong = f"{name} has shape {tuple(out.shape)} for states {tuple(x.shape)}{where}"
        found["shapes"].append((wrong, essential))
    elif out.dtype != x.dtype:
        wrong = (
            f"{name} is {str(out.dtype).removeprefix('torch.')} for states of {dtype}: bring "
            f"constants and times to the dtype of the state, as c.to(x) does{where}"
        )
        found["dtypes"].append((wrong, essential))
    elif not out.isfinite().all():
        bad = int((~out.flatten(1).isfinite().all(1)).sum())
        found["finite"].append((f"{name} is not finite at {bad} of the starts{where}", essential))


def told(error: Exception) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())[:160]
    return f"{type(error).__name__} ({words})" if words else type(error).__name__


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of the numbers."""
    if a.shape != b.shape or not (a.isfinite() & b.isfinite()).all():
        return float("inf")
    return float((a - b).abs().max() / (1 + a.abs().max()))


def _compared(
    case: Case, check: str, other: Callable[[Field, Tensor, Tensor], tuple[Tensor, Tensor]],
    why: str,
) -> Row:  # fmt: skip
    """A row on two ways to compute the same thing: the worst field of all."""
    x, t = case.near(5), case.grid(6)[1:6]
    worst, culprit = 0.0, ""
    for name, field in fields(case).items():
        try:
            difference = _apart(*other(field, x, t))
        except Exception as error:  # noqa: BLE001 - whatever a person's code may raise
            return Row(check, "fail", "raises", "no difference", f"{name} raises {told(error)}")
        if not difference <= worst:
            worst, culprit = difference, name
    measured = f"{worst:.1e}"
    return judged(check, worst <= TOLERANCE, measured, f"<= {TOLERANCE:.0e}",
                  f"{culprit} {why}", worst)  # fmt: skip


def _samples(case: Case) -> Row:
    def alone(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.cat([field(x[i : i + 1], t[2]) for i in range(len(x))])
        turned = field(x.flip(0), t[2]).flip(0)
        together = field(x, t[2])
        return torch.cat([together, together]), torch.cat([parts, turned])

    return _compared(
        case, APART[0], alone,
        "of a sample depends on the other samples of its batch (a mean, a norm or a softmax over "
        "dimension 0, or batch statistics): reduce over dimensions 1 and up only",
    )  # fmt: skip


def _times(case: Case) -> Row:
    def each(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return field(x, t), torch.stack([field(x, t[i])[i] for i in range(len(x))])

    return _compared(
        case, APART[1], each,
        "does not give sample i its own time where t has shape (B,): bring the time beside the "
        "state with per_sample(t, x), and do not reduce over it",
    )  # fmt: skip


def _repetition(case: Case) -> Row:
    def again(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first = field(x, t[0])
        torch.rand(1)  # whoever draws from the global generator gets other numbers now
        return first, field(x, t[0])

    return _compared(
        case, APART[2], again,
        "gives other numbers when called again with the same input: hidden randomness (dropout, "
        "torch.randn) or a hidden counter; all randomness belongs to dw",
    )  # fmt: skip
