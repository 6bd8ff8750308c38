"""`jax-gluon tune`: measures which kernels are fastest on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jax_gluon import _native
from jax_gluon import _tuning as tuning
from jax_gluon._kernels import CpuKernel, MetalKernel
from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import Measurement


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="measure which kernel is fastest here, for kernel=None to choose by",
        description="Times both pipelines, with several sizes of blocks, over a grid of lengths, "
        "head dims, operands and directions. What was measured is kept: run it again to go on.",
    )
    parser.add_argument("--device", choices=["cpu", "metal"], default="cpu")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after as many")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kernel")
    parser.add_argument("--table", type=Path, help="the file; default in the user's cache folder")
    parser.add_argument("--show", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--plot", type=Path, help="with --show: draw the crossover to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    parser: argparse.ArgumentParser = options.parser
    if options.plot and not options.show:
        parser.error("--plot goes with --show")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed: at least 1")
    if options.device == "metal":
        name, why = _native.metal_device()
        if not name:
            parser.error(f"--device is metal, but {why}")
    path = options.table or tuned_table.table_path(options.device)
    if path is None:
        parser.error("there is no cache folder (HOME is not set); name a file with --table")
    return _show(options, path) if options.show else _tune(options, path)


def _tune(options: argparse.Namespace, path: Path) -> int:
    total = len(tuning.cases())
    print(f"{tuned_table.device_name(options.device)}: {path}")
    done = 0
    with _progress(total) as bar:
        for case, row in tuning.tune(
            path, options.device, seconds=options.seconds, rounds=options.rounds
        ):
            done += 1
            bar.update()
            if row is not None:
                bar.write(
                    f"{case.operands} {case.direction} H{case.H} S{case.S}: "
                    f"gluon / baseline {row.ratio:.3f}, fastest {_describe(row.fastest)}"
                )
    if done < total:
        print(f"{done} of {total} measured in the time; run it again to go on")
    return 0


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
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"jax-gluon tune: {path} is no table of this device: {error}")
        return 1
    print("| operands | direction | H | S | gluon / baseline | fastest | ms |")
    print("|---|---|---|---|---|---|---|")
    for row in table.rows:
        print(
            f"| {row.operands} | {row.direction} | {row.H} | {row.S} | {row.ratio:.3f} "
            f"| {_describe(row.fastest)} | {1e3 * row.seconds[row.fastest]:.3f} |"
        )
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
