"""`python -m benchmarks.cliffs`: sizes that take longer than their neighbours suggest.

Along each axis, queries and keys together, keys alone and the head dim, the time of a size is held
against the line through the sizes beside it. All programs are compiled first, then take turns on
one core; times are those of the processor, the least of all rounds, since what disturbs only adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
from tqdm import tqdm

from benchmarks import implementations
from benchmarks.problem import Problem
from benchmarks.report import machine
from benchmarks.timing import processor_time, use_one_core

LENGTHS = (
    1, 2, 3, 4, 5, 6, 8, 9, 12, 15, 16, 17, 20, 24, 27, 28, 31, 32, 33, 40, 48, 49, 56, 63, 64,
    65, 80, 96, 100, 127, 128, 129, 160, 192, 197, 224, 255, 256, 257, 288, 320, 383, 384, 385,
    448, 511, 512,
)  # fmt: skip
KEYS = (32, 64, 100, 128, 192, 255, 256, 257, 320, 384, 511, 512, 513, 640, 777, 1024)
WIDTHS = (16, 20, 24, 32, 40, 48, 56, 64, 72, 80, 96, 100, 112, 128, 144, 160, 192, 200, 224, 256)
AXES: dict[str, Callable[[str], dict[int, Problem]]] = {
    "T = S, H64": lambda way: {x: Problem(1, 8, x, 64, direction=way) for x in LENGTHS},
    "T = S causal, H64": lambda way: {
        x: Problem(1, 8, x, 64, is_causal=True, direction=way) for x in LENGTHS
    },
    "S, T100 H64": lambda way: {x: Problem(1, 8, 100, 64, S=x, direction=way) for x in KEYS},
    "S, T1 H64": lambda way: {x: Problem(1, 8, 1, 64, S=x, direction=way) for x in KEYS},
    "H, T = S = 197": lambda way: {x: Problem(1, 8, 197, x, direction=way) for x in WIDTHS},
    "H, T = S = 512": lambda way: {x: Problem(1, 8, 512, x, direction=way) for x in WIDTHS},
}
# A turn has as many calls as take this long, in seconds.
TURN = 2e-3


def _times(problems: dict[int, Problem], name: str, rounds: int) -> dict[int, float]:
    runs = {size: implementations.make(name, problem, 1)[0] for size, problem in problems.items()}
    calls = {}
    for size, run in runs.items():
        run()
        calls[size] = max(1, round(TURN / max(processor_time(run, 2), 1e-7)))
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for size, run in runs.items():
            least[size] = min(least[size], processor_time(run, calls[size]))
    return least


def cliffs(times: dict[int, float], bar: float) -> dict[int, float]:
    """Sizes whose time is over `bar` times the line through those beside them, with the ratio."""
    sizes = sorted(times)
    found = {}
    for before, size, after in zip(sizes, sizes[1:], sizes[2:], strict=False):
        part = (size - before) / (after - before)
        line = times[before] + part * (times[after] - times[before])
        if times[size] > bar * line:
            found[size] = times[size] / line
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cliffs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bar", type=float, default=1.35)
    parser.add_argument("--all", action="store_true", help="print all times")
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=["gluon float32", "gluon bfloat16", "gluon int8"],
        choices=implementations.NAMES,
    )
    options = parser.parse_args(arguments)
    use_one_core()
    print("Machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    print("B1 N8, one core\n")
    print(f"| implementation | direction | axis | over {options.bar} of their neighbours' line |")
    print("|---|---|---|---|")
    for name in options.implementations:
        for way in ("forward", "both"):
            for axis, problems in tqdm(AXES.items(), desc=f"{name} {way}", leave=False):
                times = _times(problems(way), name, options.rounds)
                found = cliffs(times, options.bar)
                cell = ", ".join(f"{size} ({ratio:.2f})" for size, ratio in found.items()) or "none"
                print(f"| {name} | {way} | {axis} | {cell} |", flush=True)
                if options.all:
                    print("  " + ", ".join(f"{s}: {t * 1e6:.1f}" for s, t in times.items()) + " us")
                jax.clear_caches()


if __name__ == "__main__":
    main()
