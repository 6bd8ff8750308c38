"""`python -m benchmarks.gluon`: the two pipelines of the CPU kernels against each other.

Each has a process of its own on one and the same core, since what one leaves in the allocator of a
process is not the other's; they take turns on the same random operands. Times are those of the
processor, quantization included. A ratio is that of the medians, over 1 where gluon is faster; its
spread is the interquartile range of the ratios of the turns. With `--landed`, the kernels of
another checkout take their turns too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.attention import Worker
from benchmarks.problem import Problem
from benchmarks.report import machine

FORMATS = ("float32", "bfloat16", "int8", "int4")
PIPELINES = ("baseline", "gluon")


@dataclass(frozen=True)
class Comparison:
    """Seconds of each turn of each pipeline on one problem in one format."""

    problem: Problem
    format: str
    times: dict[str, list[float]]

    def median(self, pipeline: str) -> float:
        return statistics.median(self.times[pipeline])

    @property
    def ratio(self) -> float:
        return self.median("baseline") / self.median("gluon")

    @property
    def landed_ratio(self) -> float | None:
        """Time of the other checkout's kernel over that of baseline."""
        return self.median("landed") / self.median("baseline") if "landed" in self.times else None

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the ratios of the turns."""
        turns = zip(self.times["baseline"], self.times["gluon"], strict=True)
        low, _, high = statistics.quantiles([x / y for x, y in turns], n=4)
        return low, high

    def to_json(self) -> dict[str, Any]:
        return {"problem": self.problem.to_json(), "format": self.format, "times": self.times}


def compare(
    problem: Problem, format_name: str, workers: dict[str, Worker], rounds: int, least: float
) -> Comparison:
    """`rounds` turns of each worker, each of as many calls as take `least` seconds."""
    once = {name: min(worker.measure(problem, 2)["times"]) for name, worker in workers.items()}
    calls = max(1, round(least / once["baseline"]))
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(statistics.mean(worker.measure(problem, calls)["times"]))
    return Comparison(problem, format_name, times)


@contextlib.contextmanager
def open_workers(format_name: str, landed: Path | None) -> Iterator[dict[str, Worker]]:
    """A process for each pipeline, and for the other checkout, which knows no INT4 here."""
    name = f"gluon {format_name}"
    with contextlib.ExitStack() as stack:
        workers = {pipeline: Worker(name, 1, JAX_GLUON_KERNEL=pipeline) for pipeline in PIPELINES}
        if landed is not None and format_name != "int4":
            workers["landed"] = Worker(name, 1, landed)
        for worker in workers.values():
            stack.callback(worker.close)
        yield workers


def table(comparisons: Sequence[Comparison]) -> str:
    lines = [
        "| problem | operands | baseline ms | gluon ms | baseline / gluon | spread |"
        " landed / baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        low, high = c.quartiles
        lines.append(
            f"| {c.problem} | {c.format} | {1e3 * c.median('baseline'):.2f} | "
            f"{1e3 * c.median('gluon'):.2f} | {c.ratio:.3f} | {low:.3f} to {high:.3f} | "
            + ("" if c.landed_ratio is None else f"{c.landed_ratio:.3f} ")
            + "|"
        )
    return "\n".join(lines)


def plot(comparisons: Sequence[Comparison], path: Path, caption: str) -> None:
    """Ratios with their spread, a group of bars for each problem."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys(c.problem for c in comparisons))
    formats = list(dict.fromkeys(c.format for c in comparisons))
    figure, axes = pyplot.subplots(figsize=(2 + 1.3 * len(problems), 4.5), layout="constrained")
    width = 0.8 / len(formats)
    for i, name in enumerate(formats):
        rows = [c for c in comparisons if c.format == name]
        places = [problems.index(c.problem) - 0.4 + (i + 0.5) * width for c in rows]
        axes.bar(places, [c.ratio for c in rows], width, label=name)
        for place, c in zip(places, rows, strict=True):
            axes.plot([place, place], c.quartiles, color="black", linewidth=1)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(0.8, max(1.2, *(c.quartiles[1] + 0.02 for c in comparisons)))
    axes.set_xticks(range(len(problems)), [str(p).replace(" ", "\n") for p in problems], fontsize=7)
    axes.set_ylabel("time of baseline / time of gluon")
    axes.set_title(caption, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gluon", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument(
        "--directions", nargs="+", choices=["forward", "both"], default=["forward", "both"]
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each pipeline, 2 or more")
    parser.add_argument("--least", type=float, default=0.05, help="seconds of a turn")
    parser.add_argument(
        "--landed", type=Path, metavar="CHECKOUT",
        help="a tree with other kernels and its environment in .venv, to time beside (not INT4)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write every time to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    here = machine()
    command = "python -m benchmarks.gluon " + shlex.join(
        sys.argv[1:] if arguments is None else arguments
    )
    print(f"Machine: {', '.join(f'{name} {value}' for name, value in here.items())}")
    print(f"Command: {command}\n")
    problems = [
        Problem(1, options.heads, T, H, is_causal, direction)
        for direction in options.directions
        for T in options.lengths
        for H in options.head_dims
        for is_causal in (False, True)
    ]
    comparisons = []
    total = len(problems) * len(options.formats)
    with tqdm(total=total, unit="comparison", file=sys.stderr) as progress:
        for name in options.formats:
            with open_workers(name, options.landed) as workers:
                for problem in problems:
                    comparisons.append(
                        compare(problem, name, workers, options.rounds, options.least)
                    )
                    progress.update()
    comparisons.sort(key=lambda c: problems.index(c.problem))
    print(table(comparisons))
    if options.json:
        document = {
            "machine": here, "command": command,
            "comparisons": [c.to_json() for c in comparisons],
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        plot(comparisons, options.plot, f"{here['processor']}, {here['isa']}, one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
