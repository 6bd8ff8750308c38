"""`jax-gluon bench`, `accuracy` and `demo`: programs of the repository, which no wheel holds."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import jax_gluon
from jax_gluon._cli.console import complain


@dataclasses.dataclass(frozen=True)
class Program:
    """A module of the repository: what it needs beside the package, and what it is given."""

    module: str
    help: str
    extra: str
    needs: tuple[str, ...]
    arguments: tuple[str, ...] = ()


PROGRAMS = {
    "bench": Program(
        "benchmarks.attention",
        "time attention against the peers that are installed: the floor suite, in short",
        "bench",
        ("tqdm",),
        ("--suite", "floor", "--rounds", "3", "--calls", "2"),
    ),
    "accuracy": Program(
        "benchmarks.accuracy",
        "measure how far quantized attention is from float64, recipe by recipe",
        "accuracy",
        ("tqdm",),
    ),
    "demo": Program(
        "demo",
        "train a small language model with float and with quantized attention",
        "demo",
        ("flax", "optax", "matplotlib", "tqdm"),
    ),
}


def add(commands: Any) -> None:
    """Adds the commands to the parser; what they do not know goes to the program."""
    for name, program in PROGRAMS.items():
        parser = commands.add_parser(
            name, help=program.help, add_help=False,
            description=f"Runs `python -m {program.module}`, and takes its arguments.",
        )  # fmt: skip
        parser.add_argument("-h", "--help", dest="wants_help", action="store_true")
        parser.set_defaults(run=run, takes_more=True)


def run(options: argparse.Namespace) -> int:
    """Runs a program in the repository that the package comes from, or in the working folder."""
    program = PROGRAMS[options.command]
    folder = repository(program)
    if folder is None:
        return complain(
            options.command,
            f"{program.module} is in jax-gluon's repository and in its source distribution, not in "
            "the installed package: run it in a checkout, or unpack "
            f'"pip download --no-deps --no-binary :all: jax-gluon=={jax_gluon.__version__}" there',
        )
    missing = [name for name in program.needs if util.find_spec(name) is None]
    arguments: list[str] = options.rest
    if "--plot" in arguments and util.find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if missing:
        return complain(
            options.command,
            f'{", ".join(missing)} is not installed: pip install "jax-gluon[{program.extra}]"',
        )
    if options.wants_help:
        arguments = ["--help"]
    # Given last, an option goes before the same of the short form.
    command = [sys.executable, "-m", program.module, *program.arguments, *arguments]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    finished = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
    return finished.returncode if finished.returncode >= 0 else 128 - finished.returncode


def repository(program: Program) -> Path | None:
    """The folder that a program's package is in: that of a checkout; None where there is none."""
    package = program.module.split(".")[0]
    for folder in (Path(jax_gluon.__file__).resolve().parents[1], Path.cwd()):
        if (folder / package / "__init__.py").exists() and (folder / "pyproject.toml").exists():
            return folder
    return None
