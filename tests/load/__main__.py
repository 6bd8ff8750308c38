"""`python -m tests.load --seconds 60`: each part in a process, whose end is looked at."""

from __future__ import annotations

import argparse
import faulthandler
import subprocess
import sys
import time

from tests.load import memory, processes, signals, software_metal, threads
from tests.load.outcome import Options

PARTS = {
    "threads": threads.run,
    "memory": memory.run,
    "processes": processes.run,
    "signals": signals.run,
    "software-metal": software_metal.run,
}
#: Seconds after which a part that makes no end is taken for one that hangs.
PATIENCE = 3600


def run_part(name: str, options: Options) -> int:
    """The part in this process; 1 where it failed."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(PATIENCE + 10 * options.seconds, exit=True)
    outcome = PARTS[name](options)
    faulthandler.cancel_dump_traceback_later()
    for line in outcome.lines:
        print(f"{name}: {line}")
    for failure in outcome.failures:
        print(f"{name}: FAILED: {failure}")
    print(f"{name}: {'failed' if outcome.failures else 'passed'} (seed {options.seed})", flush=True)
    return 1 if outcome.failures else 0


def main(arguments: list[str] | None = None) -> int:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of a part")
    parser.add_argument("--calls", type=int, default=default.calls, help="of a kind, of memory")
    parser.add_argument("--problems", type=int, default=default.problems, help="drawn by the seed")
    parser.add_argument("--always", type=int, default=default.always, help="beside these")
    parser.add_argument("--leak", type=int, default=0, help="bytes of a call that memory is to see")
    parser.add_argument("--seed", type=int, help="default: the time")
    parser.add_argument("--only", choices=PARTS)
    given = vars(parser.parse_args(arguments))
    only = given.pop("only")
    if given["seed"] is None:
        given["seed"] = int(time.time())
    if only:
        return run_part(only, Options(**given))
    program = [sys.executable, "-m", "tests.load"]
    program += [f"--{name}={value}" for name, value in given.items()]
    failed = []
    for name in PARTS:
        ended = subprocess.run([*program, "--only", name], check=False).returncode
        if ended != 0:
            failed.append(name)
        if ended < 0:
            print(f"{name}: FAILED: ended by signal {-ended}", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"{len(PARTS)} parts passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
