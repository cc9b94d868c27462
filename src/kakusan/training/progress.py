"""Progress with time left, on a terminal; silence elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[..., None]


@contextlib.contextmanager
def progress(label: str, total: int, start: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """A bar on the terminal; the value is called with (done, words) after each piece of work.

    Arguments:
        label: What is going on.
        total: How many pieces of work there are.
        start: How many were done before.
        quiet: Whether to show nothing, as where standard error is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, words="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=start, words="")

        def advance(done: int, words: str = "") -> None:
            if words:
                bar.update(task, completed=done, words=words)
            else:
                bar.update(task, completed=done)

        yield advance
