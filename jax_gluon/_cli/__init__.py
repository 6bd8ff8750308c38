"""The command `jax-gluon`: a file for each of its commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from jax_gluon._cli import doctor, programs, tune
from jax_gluon._cli.console import complain
from jax_gluon._version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jax-gluon", description="Quantized flash attention that trains, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"jax-gluon {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (doctor, tune, programs):
        command.add(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest, options.parser = rest, parser
    try:
        status = options.run(options)
        print(end="", flush=True)
    except OSError as error:  # what is written to is full, not there, or gone
        is_gone = isinstance(error, BrokenPipeError)  # `jax-gluon doctor | head`
        _drop_output()
        return 1 if is_gone else complain(options.command, str(error))
    return status


def _drop_output() -> None:
    """What is still to be printed goes nowhere: Python would fail over it as it ends."""
    with contextlib.suppress(OSError):  # no file stands behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
