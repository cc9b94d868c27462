"""What a certification found: rows of checks, printed as a table or written as JSON."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from kakusan.errors import KakusanError

Verdict = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: pass, fail or skipped.
        measured: The number, in words where it has an error bar.
        expected: What it should be.
        why: One sentence: why it failed or was skipped, or what a pass implies.
        value: The number itself, where there is one.
    """

    check: str
    verdict: Verdict
    measured: str = ""
    expected: str = ""
    why: str = ""
    value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as plain values; a number that is not finite becomes null."""
        finite = self.value is not None and math.isfinite(self.value)
        return {**vars(self), "value": self.value if finite else None}


def judged(
    check: str,
    good: bool,
    measured: str,
    expected: str,
    why: str,
    value: float | None = None,
    note: str = "",
) -> Row:
    """A row that passes where `good`, with a note, and says why where it does not."""
    if good:
        return Row(check, "pass", measured, expected, note, value)
    return Row(check, "fail", measured, expected, why, value)


def skipped(check: str, why: str, measured: str = "", value: float | None = None) -> Row:
    """A row that was not measured, and why."""
    return Row(check, "skipped", measured, "", why, value)


@dataclass(frozen=True)
class Certificate:
    """What `certify` returns; `str` makes it a table.

    Attributes:
        process: Which process.
        method: Which solver.
        rows: What was checked.
        seconds: How long it took.

    Example:
        >>> print(Certificate("Swirl", "EulerMaruyama", (Row("shapes", "pass", "0"),), 1.0))
        Swirl, solved by EulerMaruyama: 1 passed, 0 failed, 0 skipped, in 1.0 s
          check   verdict  measured  expected
          shapes  pass     0
    """

    process: str
    method: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(row.verdict != "fail" for row in self.rows)

    def count(self, verdict: Verdict) -> int:
        """How many rows have this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def __getitem__(self, check: str) -> Row:
        """The row of a check."""
        found = [row for row in self.rows if row.check == check]
        if not found:
            raise KakusanError(f"no check {check!r}; there are {[r.check for r in self.rows]}")
        return found[0]

    def __str__(self) -> str:
        """The table, with the reasons below their rows."""
        head = ("check", "verdict", "measured", "expected")
        cells = [head, *((r.check, r.verdict, r.measured, r.expected) for r in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(4)]
        lines = [
            f"{self.process}, solved by {self.method}: {self.count('pass')} passed, "
            f"{self.count('fail')} failed, {self.count('skipped')} skipped, "
            f"in {self.seconds:.1f} s"
        ]
        for line, row in zip(cells, (None, *self.rows), strict=True):
            padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            lines.append(f"  {padded}".rstrip())
            if row is not None and row.why:
                lines += textwrap.wrap(row.why, 92, initial_indent="      ",
                                       subsequent_indent="      ")  # fmt: skip
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain values."""
        return {
            "process": self.process, "method": self.method, "ok": self.ok,
            "seconds": round(self.seconds, 3), "rows": [row.to_json() for row in self.rows],
        }  # fmt: skip
