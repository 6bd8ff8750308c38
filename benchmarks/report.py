"""Timings to numbers, tables and plots."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.problem import Problem, Requirement


@dataclass(frozen=True)
class Measurement:
    """Times of one implementation on one problem, in seconds, and its error."""

    problem: Problem
    name: str
    times: list[float]
    error: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        if len(self.times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / self.median

    def to_json(self) -> dict[str, Any]:
        return {
            "problem": self.problem.to_json(), "name": self.name, "times": self.times,
            "median": self.median, "spread": self.spread, "error": self.error,
        }  # fmt: skip


def machine() -> dict[str, str]:
    """Processor, instruction set of our kernels, and versions."""
    from jax_gluon import _plugin

    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    versions = {}
    for package in ("jax", "jaxlib", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": processor, "isa": _plugin.cpu_isa(), **versions}


def table(measurements: list[Measurement]) -> str:
    """Markdown, a row for each implementation and problem; ratios to the problem's first row."""
    lines = [
        "| problem | implementation | median ms | spread | G operations/s | time ratio | error |",
        "|---|---|---|---|---|---|---|",
    ]
    first: dict[Problem, float] = {}
    for m in measurements:
        base = first.setdefault(m.problem, m.median)
        error = "" if m.error is None else f"{m.error:.1e}"
        lines.append(
            f"| {m.problem} | {m.name} | {1e3 * m.median:.2f} | {100 * m.spread:.0f} % | "
            f"{m.problem.operations / m.median / 1e9:.0f} | {m.median / base:.2f} | {error} |"
        )
    return "\n".join(lines)


def ratio(measurements: list[Measurement], requirement: Requirement) -> float | None:
    """How many times faster `fast` is than `slow`; None where either was not measured."""
    median = {m.name: m.median for m in measurements if m.problem == requirement.problem}
    if requirement.fast not in median or requirement.slow not in median:
        return None
    return median[requirement.slow] / median[requirement.fast]


def requirements_table(
    measurements: list[Measurement], requirements: tuple[Requirement, ...]
) -> str:
    lines = ["| problem | ratio of medians | required | measured |", "|---|---|---|---|"]
    for requirement in requirements:
        measured = ratio(measurements, requirement)
        if measured is not None:
            lines.append(
                f"| {requirement.problem} | {requirement.slow} / {requirement.fast} | "
                f"{requirement.ratio:.2f} | {measured:.2f} |"
            )
    return "\n".join(lines)


def plot(measurements: list[Measurement], path: Path, caption: str) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys(m.problem for m in measurements))
    names = list(dict.fromkeys(m.name for m in measurements))
    figure, axes = pyplot.subplots(figsize=(2 + 2.2 * len(problems), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [m for m in measurements if m.name == name]
        places = [problems.index(m.problem) - 0.4 + (i + 0.5) * width for m in rows]
        axes.bar(places, [m.problem.operations / m.median / 1e9 for m in rows], width, label=name)
    axes.set_xticks(range(len(problems)), [str(p).replace(" ", "\n", 1) for p in problems])
    axes.set_ylabel("G operations / s")
    axes.set_title(caption, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
