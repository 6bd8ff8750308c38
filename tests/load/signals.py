"""Signals while calls run: to the process by a timer, to each of its threads, and Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tests.load import problems
from tests.load.outcome import Options, Outcome

INTERVAL = 5e-4


def signal_every_thread(number: int) -> int:
    """Also those of XLA's pools, of which Python knows nothing; the signals that were sent."""
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return sum(tgkill(os.getpid(), thread, number) == 0 for thread in threads)


class Sender:
    """A thread that calls `send` again and again, until the block is left."""

    def __init__(self, send: Callable[[], Any], pause: Callable[[], float]) -> None:
        self._send, self._pause = send, pause
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over.wait(self._pause()):
            self._send()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


class Calls:
    """Problems one after the other, each result held against the bits of the first."""

    def __init__(self, every: list[problems.Problem], failures: list[str]) -> None:
        self._every, self._failures = every, failures
        self._alone = [problem.digest() for problem in every]
        self.made = 0

    def until(self, end: float) -> None:
        while time.monotonic() < end and not self._failures:
            self.call(self.made % len(self._every))

    def call(self, which: int) -> None:
        problem = self._every[which]
        if problem.digest() != self._alone[which]:
            self._failures.append(f"other bits of {problem.name}")
        self.made += 1

    def each_once(self) -> None:
        for which in range(len(self._every)):
            self.call(which)


def handled(options: Options, calls: Calls, outcome: Outcome) -> None:
    """Python's handlers, of an interval timer and of a signal to every thread."""
    counts: Counter[str] = Counter()
    before = {
        number: signal.signal(
            number, lambda number, _: counts.update([signal.Signals(number).name])
        )
        for number in (signal.SIGALRM, signal.SIGUSR1)
    }
    sent = 0

    def send() -> None:
        nonlocal sent
        sent += signal_every_thread(signal.SIGUSR1)

    made = calls.made
    try:
        signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)
        with Sender(send, lambda: 2 * INTERVAL):
            calls.until(time.monotonic() + options.seconds / 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome.lines.append(
        f"{calls.made - made:,} calls beside {counts['SIGALRM']:,} SIGALRM handled, and {sent:,} "
        f"SIGUSR1 to single threads, {counts['SIGUSR1']:,} handled"
    )
    if not counts["SIGALRM"] or not counts["SIGUSR1"]:
        outcome.failures.append("no signal came")


def interrupted(options: Options, calls: Calls, outcome: Outcome) -> None:
    """KeyboardInterrupt at any moment, also while JAX traces and compiles."""
    rng = random.Random(options.seed)
    may_interrupt = False

    def interrupt(*_: object) -> None:
        # Once in each block that catches it.
        nonlocal may_interrupt
        if may_interrupt:
            may_interrupt = False
            raise KeyboardInterrupt

    made, interrupts, cleared = calls.made, 0, 0
    before = signal.signal(signal.SIGINT, interrupt)
    end = time.monotonic() + options.seconds / 2
    try:
        with Sender(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: rng.uniform(0, 0.05)):
            while time.monotonic() < end and not outcome.failures:
                try:
                    may_interrupt = True
                    calls.until(min(end, time.monotonic() + 1))
                    may_interrupt = False
                except KeyboardInterrupt:
                    interrupts += 1
                    if interrupts % 50 == 0:
                        cleared += 1
                        jax.clear_caches()
    finally:
        signal.signal(signal.SIGINT, before)
    calls.each_once()
    outcome.lines.append(
        f"{interrupts:,} KeyboardInterrupts in {calls.made - made:,} calls, programs dropped "
        f"{cleared} times; then each problem once more"
    )
    if not interrupts:
        outcome.failures.append("no KeyboardInterrupt came")


def run(options: Options) -> Outcome:
    outcome = Outcome()
    calls = Calls([*problems.always()[: options.always], problems.outside_jit()], outcome.failures)
    handled(options, calls, outcome)
    interrupted(options, calls, outcome)
    return outcome
