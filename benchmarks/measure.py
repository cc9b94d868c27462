"""Measuring: CPU seconds per call of several candidates, in interleaved rounds.

Machines differ and their speed drifts, so only ratios within one run are worth printing. Each
round calls every candidate once, in an order that rotates: what disturbs one round disturbs all
candidates alike. Seconds are those of the process on the CPU (`time.process_time`), which does not
count the time other processes took; compare medians.

Example:
    seconds = interleave({"ours": ours, "theirs": theirs}, rounds=9)
    ratio = median(seconds["theirs"]) / median(seconds["ours"])
"""

import time
from collections.abc import Callable


def interleave(
    candidates: dict[str, Callable[[], None]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times the candidates side by side.

    Arguments:
        candidates: What to call, by name.
        rounds: How often to call each.
        warmup: Calls of each that are not counted.

    Returns:
        By name, the CPU seconds of each counted call.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round in range(rounds):
        start = round % len(names)
        for name in names[start:] + names[:start]:
            begun = time.process_time()
            candidates[name]()
            seconds[name].append(time.process_time() - begun)
    return seconds
