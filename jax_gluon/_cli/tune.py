"""`jax-gluon tune`: measures which kernels are fastest on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jax_gluon import _native
from jax_gluon import _tuning as tuning
from jax_gluon._cli.console import complain
from jax_gluon._kernels import CpuKernel, MetalKernel
from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import Measurement
from jax_gluon._plan.tuned_table import Crossover
from jax_gluon._timing import MIN_ROUNDS


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="measure which kernel is fastest here, for kernel=None to choose by",
        description="Times both pipelines, with several sizes of blocks, over a grid of lengths, "
        "head dims, operands and directions; with --device metal also from which size on the GPU "
        "is faster than the CPU. What is sure is kept: run it again to go on.",
    )
    parser.add_argument("--device", choices=["cpu", "metal"], default="cpu")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after as many")
    parser.add_argument(
        "--rounds",
        type=int,
        default=MIN_ROUNDS,
        help="turns of each kernel; up to four times as many where they differ",
    )
    parser.add_argument("--table", type=Path, help="the file; default in the user's cache folder")
    parser.add_argument("--show", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--plot", type=Path, help="with --show: draw the crossover to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    parser: argparse.ArgumentParser = options.parser
    if options.plot and not options.show:
        parser.error("--plot goes with --show")
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds is {options.rounds}; allowed: at least {MIN_ROUNDS}")
    if options.device == "metal":
        name, why = _native.metal_device()
        if not name:
            parser.error(f"--device is metal, but {why}")
    path = options.table or tuned_table.table_path(options.device)
    if path is None:
        parser.error("there is no cache folder (HOME is not set); name a file with --table")
    return _show(options, path) if options.show else _tune(options, path)


def _tune(options: argparse.Namespace, path: Path) -> int:
    print(f"{tuned_table.device_name(options.device)}: {path}")
    try:
        tuned_table.check_writable(path)
    except OSError as error:
        return complain("tune", f"{path} can't be written: {error}; name another with --table")
    if path.exists():
        try:
            tuned_table.load(path, options.device)
        except (OSError, *tuned_table.BROKEN) as error:
            print(f"what is there is no table of this device ({error}); it is kept as *.broken")
    total = len(tuning.cases()) + (len(tuning.OPERANDS) if options.device == "metal" else 0)
    done: dict[tuning.Case | str, bool] = {}  # whether it is sure
    with _progress(total) as bar:
        for case, found in tuning.tune(
            path, options.device, seconds=options.seconds, rounds=options.rounds
        ):
            if case not in done:
                bar.update()
            done[case] = not isinstance(found, tuning.Unsure)
            if found is not None:
                bar.write(f"{case}: {_outcome(found)}")
    if unsure := len(done) - sum(done.values()):
        print(
            f"{unsure} not kept: their rounds differ too much. Other programs use the machine; run "
            "it again when they do not"
        )
    if len(done) < total:
        print(f"{len(done)} of {total} measured in the time; run it again to go on")
    return 0


def _outcome(found: Measurement | Crossover | tuning.Unsure) -> str:
    if isinstance(found, tuning.Unsure):
        return f"NOT KEPT, unsure: {found.found}"
    if isinstance(found, Crossover):
        return f"the GPU pays {_crossover(found)}"
    return f"gluon / baseline {found.ratio:.3f}, fastest {_describe(found.fastest)}"


def _crossover(found: Crossover) -> str:
    if found.min_products is None:
        return f"nowhere up to {found.max_products} multiply-accumulates"
    return f"from {found.min_products} multiply-accumulates on"


def _describe(kernel: CpuKernel | MetalKernel) -> str:
    if isinstance(kernel, MetalKernel):
        return kernel.name
    sizes = [str(size) for size in (kernel.block_k, kernel.subtile) if size is not None]
    return " ".join([kernel.name, *filter(None, ["/".join(sizes)])])


class _Lines:
    """What tqdm does, where it is not installed."""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self) -> None:
        """Nothing: the lines show how far it is."""

    def write(self, line: str) -> None:
        print(line, flush=True)


def _progress(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines()
    return tqdm(total=total, unit="case", file=sys.stderr)


def _show(options: argparse.Namespace, path: Path) -> int:
    try:
        table = tuned_table.load(path, options.device)
    except FileNotFoundError:
        print(f"jax-gluon tune: there is no table {path}; `jax-gluon tune` makes one")
        return 1
    except (OSError, *tuned_table.BROKEN) as error:
        print(f"jax-gluon tune: {path} is no table of this device: {error}")
        return 1
    print("| operands | direction | H | S | gluon / baseline | fastest | ms |")
    print("|---|---|---|---|---|---|---|")
    for row in table.rows:
        print(
            f"| {row.operands} | {row.direction} | {row.H} | {row.S} | {row.ratio:.3f} "
            f"| {_describe(row.fastest)} | {1e3 * row.seconds[row.fastest]:.3f} |"
        )
    for each in table.crossovers:
        print(f"\n{each.operands}: the GPU pays {_crossover(each)}")
    if options.plot:
        try:
            plot(table.rows, options.plot, tuned_table.device_name(options.device))
        except ImportError:
            print('jax-gluon tune: --plot needs matplotlib: pip install "jax-gluon[tune]"')
            return 1
    return 0


def plot(rows: tuple[Measurement, ...], path: Path, title: str) -> None:
    """Draws each ratio over the keys, one line for operands and head dim, to `path`."""
    from matplotlib import pyplot

    directions = sorted({row.direction for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(
        1, len(directions), figsize=(5 * len(directions), 4), sharey=True, squeeze=False
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        lines = sorted({(row.operands, row.H) for row in rows if row.direction == direction})
        for operands, H in lines:
            points = sorted(
                (row.S, row.ratio)
                for row in rows
                if (row.operands, row.H, row.direction) == (operands, H, direction)
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{operands}, H {H}")
        axis.axhline(1.0, color="gray", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("keys")
        axis.set_title(direction)
    axes[0][0].set_ylabel("gluon / baseline, time")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
