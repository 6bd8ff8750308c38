"""`python -m tests.fuzz --seconds 3600`: random cases until the time is over.

It prints how many were right, which the calls refused, and each failure as a line that makes it
again: `python -m tests.fuzz --case '{...}'`.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time

import jax

from jax_gluon import _native
from tests.fuzz.cases import Case, draw, simpler
from tests.fuzz.check import Refused, failures


def wrong_with(case: Case, refusals: collections.Counter[str] | None = None) -> list[str] | None:
    """As `failures`, with errors that nobody expects among them; None: refused."""
    try:
        return failures(case)
    except Refused as error:
        if refusals is not None:
            refusals[re.sub(r"\d+", "n", str(error))[:160]] += 1
        return None
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:500]}"]


def smallest(case: Case, attempts: int = 60) -> Case:
    """A case that fails too, with as little in it as a few attempts leave."""
    left = attempts
    while True:
        for other in simpler(case):
            left -= 1
            if left < 0:
                return case
            if wrong_with(other):
                case = other
                break
        else:
            return case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first case; default: the time")
    parser.add_argument("--implementations", nargs="+", default=["cpu", "cpu", "cpu", "xla"])
    parser.add_argument("--isa", nargs="+", help="default: all that this processor and build have")
    parser.add_argument("--case", help="one case, as a failure prints it")
    options = parser.parse_args(arguments)
    if options.case:
        found = wrong_with(Case.of(options.case))
        print("refused" if found is None else "\n".join(found) or "right")
        return 1 if found else 0
    variants = options.isa or list(_native.plugin().cpu_isas_supported())
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"first seed {seed}; variants {' '.join(variants)}", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        case = draw(seed, variants, options.implementations)
        seed += 1
        found = wrong_with(case, refusals)
        counts["refused" if found is None else "wrong" if found else "right"] += 1
        if found:
            case = smallest(case)
            print(f"seed {seed - 1}: {'; '.join(wrong_with(case) or found)}")
            print(f"  python -m tests.fuzz --case '{case}'", flush=True)
        if sum(counts.values()) % 50 == 0:
            jax.clear_caches()  # else programs of an hour fill the memory
    for text, count in refusals.most_common(8):
        print(f"{count} refused: {text}")
    print(", ".join(f"{counts[x]} {x}" for x in ("right", "refused", "wrong")))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
