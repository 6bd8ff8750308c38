"""Processes: children that are forked after calls, and those that are spawned."""

from __future__ import annotations

import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np

from tests.load import problems
from tests.load.outcome import Options, Outcome

#: Seconds that a child may take: to load JAX and compile, on a machine that does other things.
PATIENCE = 300
#: Seconds after which a forked child that calls JAX is taken for one that never ends.
SHORT_PATIENCE = 10
CALLERS = 4


def without_jax() -> None:
    """What a loader of data does in a process of its own."""
    x = np.random.default_rng(0).standard_normal((64, 64))
    assert np.isfinite(x @ x).all()


def with_jax(problem: problems.Problem, expected: str) -> None:
    assert problem.digest() == expected


def digests_of_child(count: int) -> list[str]:
    return [problem.digest() for problem in problems.always()[:count]]


def ended(context: BaseContext, target: Callable[..., None], *given: Any, patience: float) -> str:
    """ "" where the child ended well; else how it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and Python, that forking is dangerous
        child = context.Process(target=target, args=given)  # type: ignore[attr-defined]
        child.start()
    child.join(patience)
    if child.exitcode is None:
        child.kill()
        child.join()
        return f"did not end in {patience} seconds"
    return "" if child.exitcode == 0 else f"ended with {child.exitcode}"


def forked(options: Options, outcome: Outcome) -> None:
    """Forks while other threads call."""
    every = problems.always()[: options.always]
    alone = [problem.digest() for problem in every]
    fork = multiprocessing.get_context("fork")
    is_over = threading.Event()

    def call(which: int) -> int:
        calls = 0
        while not is_over.is_set():
            if every[which].digest() != alone[which]:
                outcome.failures.append(f"beside forks: other bits of {every[which].name}")
                break
            which, calls = (which + 1) % len(every), calls + 1
        return calls

    children, end = 0, time.monotonic() + options.seconds
    with ThreadPoolExecutor(CALLERS) as executor:
        callers = [executor.submit(call, i % len(every)) for i in range(CALLERS)]
        while time.monotonic() < end and not outcome.failures:
            children += 1
            if how := ended(fork, without_jax, patience=PATIENCE):
                outcome.failures.append(f"a forked child without calls {how}")
        is_over.set()
        calls = sum(each.result() for each in callers)
    outcome.lines.append(f"{children} forked children without calls, beside {calls:,} calls")

    if [problem.digest() for problem in every] != alone:
        outcome.failures.append("after forks: other bits in the parent")


def forked_callers(outcome: Outcome) -> None:
    """No promise: XLA's locks and threads are not the child's. What becomes of it is not judged."""
    fork = multiprocessing.get_context("fork")
    before, new = problems.always()[0], problems.always()[0]
    alone = before.digest()
    for program, problem in (("compiled before", before), ("new", new)):
        how = ended(fork, with_jax, problem, alone, patience=SHORT_PATIENCE)
        outcome.lines.append(f"a forked child that runs a program {program}: {how or 'right'}")


def started(method: str, options: Options, outcome: Outcome) -> None:
    """Children that import the package themselves, two at a time."""
    expected = digests_of_child(options.always)
    with multiprocessing.get_context(method).Pool(2) as pool:
        try:
            found = [pool.apply_async(digests_of_child, (options.always,)) for _ in range(2)]
            wrong = sum(each.get(PATIENCE) != expected for each in found)
        except Exception as error:
            outcome.failures.append(f"{method}: {error!r}")
            return
    outcome.lines.append(f"{method}: {len(expected)} problems in each of {len(found)} children")
    if wrong:
        outcome.failures.append(f"{method}: other bits in {wrong} children")


def run(options: Options) -> Outcome:
    outcome = Outcome()
    # Children are started first: what is forked has then been used.
    started("spawn", options, outcome)
    started("forkserver", options, outcome)
    forked(options, outcome)
    forked_callers(outcome)
    return outcome
