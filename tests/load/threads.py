"""Threads that call at once: each result is to have the bits of the same call made alone."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax

from tests.load import problems
from tests.load.outcome import Options, Outcome

THREADS = 16


def run(options: Options) -> Outcome:
    every = [*problems.always()[: options.always], problems.outside_jit()]
    every += problems.drawn(options.seed, options.problems)
    alone = [problem.digest() for problem in every]
    jax.clear_caches()  # threads trace and compile at once, too
    start = threading.Barrier(THREADS)
    counts: Counter[int] = Counter()
    failures: list[str] = []
    counting = threading.Lock()

    def work(thread: int) -> None:
        rng = random.Random(options.seed * THREADS + thread)
        start.wait()
        end = time.monotonic() + options.seconds
        which = thread % len(every)
        while time.monotonic() < end and not failures:
            try:
                wrong = every[which].digest() != alone[which]
            except Exception as error:  # whatever is said, nobody expects it
                failures.append(f"{every[which].name}: {error!r}")
                return
            with counting:
                counts[which] += 1
            if wrong:
                failures.append(f"{every[which].name}: other bits than alone")
            which = rng.randrange(len(every))

    with ThreadPoolExecutor(THREADS) as executor:
        list(executor.map(work, range(THREADS)))
    calls = f"{counts.total():,} calls of {len(counts)} of {len(every)} problems"
    return Outcome([f"{calls} from {THREADS} threads"], failures)
