"""What the numbers of kakusan.core.hashing pass: the batteries of TestU01, and 1e9 normal numbers.

The words are made by generator.c, which is compiled here and first compared with the library's,
word for word. TestU01 (L'Ecuyer and Simard, 2007) is Debian's package libtestu01-0-dev, in the
section non-free; where it is missing the batteries are left out with a line that says so.

    python benchmarks/generator.py                                     # SmallCrush, 5 minutes
    python benchmarks/generator.py --battery crush --orders 100000 --words both --straight
    python benchmarks/generator.py --numbers 1e9                       # moments, 3 minutes
"""

import argparse
import math
import subprocess
import tempfile
from pathlib import Path

import torch

from kakusan.core.hashing import normals, words
from kakusan.core.noise import mix

# how the words of keys and lanes become one sequence: lanes a key, seeds in turn, whether the
# places are the nodes of a tree
ORDERS = {
    "100000": (100_000, 1, 0),
    "64": (64, 1, 0),
    "1": (1, 1, 0),
    "2": (2, 1, 0),
    "1000": (1000, 1, 0),
    "1-seeds": (1, 4, 0),
    "64-seeds": (64, 4, 0),
    "64-tree": (64, 1, 1),
    "one-key": (2**32 - 1, 1, 0),
}
WORDS = {"both": 3, "first": 1, "second": 2}
CONTROLS = {"library": 0, "repeating": 1, "half": 2, "xor": 3}


def signed(value):
    """The two int32 words of a 64-bit key, the low one first."""
    halves = [value & 0xFFFFFFFF, value >> 32]
    return torch.tensor([h - (h >> 31 << 32) for h in halves], dtype=torch.int32)


def compiled(folder):
    """The driver, and whether it has the batteries."""
    source, program = Path(__file__).with_suffix(".c"), Path(folder) / "generator"
    base = ["cc", "-O3", "-march=native", str(source), "-o", str(program)]
    libraries = ["-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm"]
    if subprocess.run([*base, "-DTESTU01", *libraries], capture_output=True).returncode == 0:
        return program, True
    subprocess.run(base, check=True)
    return program, False


def compare(program, lanes=100_000):
    """The words in C against the library's."""
    for key in ((0, 0, 0), (7, 0, 3), (2**63, 20, 2**20 - 1)):
        command = [program, "words", *map(str, key), str(lanes)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = torch.tensor([int(x) for x in text.split()]).reshape(lanes, 2)
        ours = words(torch.arange(lanes, dtype=torch.int32), signed(mix(*key)))
        assert torch.equal(found, torch.stack(ours, 1).long()), key
    print(f"C and torch agree on 3 keys of {lanes} lanes, word for word")


def battery(program, name, order, word, mirrored, first, control, tests):
    """P-values by test."""
    setting = [first, *ORDERS[order], WORDS[word], int(mirrored), CONTROLS[control], *tests]
    command = [program, name, *map(str, setting)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("p ")]
    return [(label, float(p)) for _, p, label in rows]


def numbers(total, lanes=100_000, lags=(1, 2, 3, 8)):
    """Moments, tails, neighbours and float32 against float64, with standard errors."""
    n, largest, gap, apart = 0, 0.0, 0.0, 0.0
    sums = {t: torch.zeros(8, dtype=torch.float64) for t in (torch.float32, torch.float64)}
    tails = torch.zeros(3, dtype=torch.float64)
    near = torch.zeros(len(lags), 4, dtype=torch.float64)
    lane = torch.arange(lanes, dtype=torch.int32)
    while n < total:
        key = signed(mix(0, 0, n // (2 * lanes)))
        single, double = (torch.stack(normals(lane, key, t)) for t in sums)
        for t, z in ((torch.float32, single.double()), (torch.float64, double)):
            power = torch.ones_like(z)
            for p in range(8):
                power *= z
                sums[t][p] += power.sum()
        # both have the same radius, whatever is done with the angle
        radius = (single.double() ** 2).sum(0), (double**2).sum(0)
        apart += (radius[0] - radius[1]).sum().item()
        gap = max(gap, (radius[0].sqrt() - radius[1].sqrt()).abs().max().item())
        size = single.abs()
        largest = max(largest, size.max().item())
        tails += torch.stack([(size > c).sum() for c in (4, 5, 6)])
        z, y = double
        for k, lag in enumerate(lags):
            for j, (a, b) in enumerate(((z, z), (y, y), (z, y))):
                near[k, j] += a[lag:] @ b[:-lag]
            near[k, 3] += (z[lag:] ** 2 - 1) @ (z[:-lag] ** 2 - 1) / 2
        n += 2 * lanes
    print(f"\n{n} numbers; deviations in standard errors\n  moment   float32   float64")
    a, b = (s / n for s in sums.values())
    for p in range(1, 9):
        mean, square = (0 if q % 2 else math.prod(range(1, q, 2)) for q in (p, 2 * p))
        error = math.sqrt((square - mean**2) / n)
        one, two = (a[p - 1] - mean) / error, (b[p - 1] - mean) / error
        print(f"  E z^{p} {one:11.2f} {two:9.2f}   (1 is {error:.1e})")
    print(f"  float32 adds {apart / n:+.1e} to the variance, at most {gap:.1e} to a radius")
    print(f"  largest |z| {largest:.4f}")
    for c, count in zip((4, 5, 6), tails.tolist(), strict=True):
        print(f"  |z| > {c}: {count:.0f}, expected {n * math.erfc(c / math.sqrt(2)):.1f}")
    print("  neighbouring lanes: z z', y y', z y', z^2 z'^2")
    for lag, row in zip(lags, near * (2 / n) ** 0.5, strict=True):
        print(f"  {lag:3} apart" + "".join(f"{x:9.2f}" for x in row.tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--battery", choices=["small", "crush"], default="small")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--words", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--straight", action="store_true", help="leave out the mirrored words")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--control", choices=CONTROLS, default="library")
    parser.add_argument("--tests", nargs="+", default=[], help="numbers of single tests of Crush")
    parser.add_argument("--numbers", type=float, help="how many normal numbers, and no battery")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.numbers:
        numbers(int(args.numbers))
        return
    with tempfile.TemporaryDirectory() as folder:
        program, able = compiled(folder)
        compare(program)
        if not able:
            print("the batteries are left out: apt-get install libtestu01-0-dev (non-free)")
            return
        count = outside = 0
        print(f"\n{'lanes a key':14}{'words':10}{'bits':10}{'smallest p':>12}  beyond 0.001")
        for word in args.words:
            for order in args.orders:
                for mirrored in (False, True)[: 1 if args.straight else 2]:
                    setting = order, word, mirrored, args.first, args.control, args.tests
                    found = battery(program, args.battery, *setting)
                    odd = [f"{k} {min(p, 1 - p):.1g}" for k, p in found if not 0.001 < p < 0.999]
                    least = min(min(p, 1 - p) for _, p in found)
                    side = "mirrored" if mirrored else "straight"
                    print(f"{order:14}{word:10}{side:10}{least:12.2g}  {', '.join(odd)}")
                    count, outside = count + len(found), outside + len(odd)
        print(f"{outside} of {count} p-values are beyond 0.001; {0.002 * count:.1f} expected")


if __name__ == "__main__":
    main()
