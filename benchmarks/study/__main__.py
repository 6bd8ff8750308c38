"""`python -m benchmarks.study`: trains every model in every format, and keeps what it finds.

A run whose record is in the folder of `--results` is not run again, so that an interrupted study
goes on where it was. `python -m benchmarks.study.page` makes tables and plots of the records.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import jax

from benchmarks.study import results
from benchmarks.study.formats import ALL, CASES, FORMATS
from benchmarks.study.tasks import MODELS, SIZES
from benchmarks.study.training import Settings, train


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__.split("\n\n")[0].split(": ", 1)[1]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    for name, known, default in (("format", ALL, list(FORMATS)), ("case", CASES, ["plain"])):
        parser.add_argument(
            f"--{name}s", nargs="+", choices=known, default=default, metavar=name.upper(),
            help=f"of {', '.join(known)}",
        )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each run")
    parser.add_argument("--results", type=Path, default=Path("build/study"), help="their folder")
    return parser.parse_args(arguments)


def planned(options: argparse.Namespace) -> list[Settings]:
    """Formats of one seed follow each other, so that what is there can be compared early."""
    order = itertools.product(
        options.sizes, options.seeds, options.models, options.cases, options.formats
    )
    return [
        Settings(model, size, form, seed, options.steps, case)
        for size, seed, model, case, form in order
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    runs = planned(options)
    try:
        # Before hours of work: a foreign file is told at once.
        missing = [run for run in runs if results.find(options.results, run) is None]
    except results.ForeignFile as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished in {options.results}")
    for run in missing:
        record = train(run)
        results.write(options.results, record)
        print(f"{run.name}: held-out loss {record['held_out'][-1][1]:.4f}", flush=True)
        jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
