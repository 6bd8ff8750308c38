"""Calls of Metal's kernels on the software device, while the device fails."""

from __future__ import annotations

import ctypes
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jax_gluon import _native, debug
from tests.load import memory, problems
from tests.load.outcome import Options, Outcome

THREADS = 4
#: Of a program's first call.
AT_FIRST = {
    "compile_failure": "Metal does not compile",
    "pipeline_failure": "Metal makes no pipeline",
}
#: Of any call; "" where the call is to be right all the same.
FAULTS = {
    "out_of_memory": "Metal has no memory for",
    "no_copy_refused": "",
    "command_buffer_error": "Internal Error",
    "command_buffer_out_of_memory": "the GPU is out of memory",
    "watchdog": "the GPU was busy too long",
    "slow_completion": "",
}
HINT = 'implementation="cpu"'
#: Bytes that a call may seem to leave: calls are few.
BAR = 4096


class Device:
    """The faults of the library that the plugin has loaded."""

    def __init__(self) -> None:
        name, why = _native.metal_device()
        if name != "Software Metal":
            raise RuntimeError(why or f"faults can't be planted in {name}")
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
        self._library = ctypes.CDLL(next(x for x in maps if Path(x).name == "libsoftmetal.so"))

    def plant(self, fault: str, count: int) -> None:
        assert self._library.softmetal_inject_fault(fault.encode(), count)

    def clear(self) -> None:
        self._library.softmetal_clear_faults()


class Load:
    """Calls, and what became of them."""

    def __init__(self, options: Options, every: list[problems.Problem], outcome: Outcome) -> None:
        self.options, self.every, self.outcome = options, every, outcome
        self.device = Device()
        self.right: list[str] = []
        self.errors: Counter[str] = Counter()
        self.calls = 0

    def call(self, which: int, faults: dict[str, str]) -> None:
        """Right bits, or one of the errors of `faults`, which tells what can be done."""
        self.calls += 1
        try:
            found = self.every[which].digest()
        except (RuntimeError, ValueError) as error:  # JAX raises either
            text = str(error)
            kinds = [fault for fault, words in faults.items() if words and words in text]
            if not kinds or HINT not in text:
                self.outcome.failures.append(f"unclear: {text}")
            self.errors.update(kinds)
            return
        if which < len(self.right) and found != self.right[which]:
            self.outcome.failures.append(f"other bits of {self.every[which].name}")

    def at_first(self) -> None:
        """Programs that Metal does not compile at their first call, and does at the next."""
        for which in range(len(self.every)):
            for fault, words in AT_FIRST.items():
                self.device.plant(fault, -1)  # with the archive of pipelines, and without
                self.call(which, {fault: words})
                self.device.clear()
            self.right.append(self.every[which].digest())

    def one_after_the_other(self, seconds: float) -> None:
        """A call that may fail, then one that may not."""
        rng = random.Random(self.options.seed)
        made, resident = [], []
        start = time.monotonic()
        while (now := time.monotonic()) < start + seconds and not self.outcome.failures:
            which, fault = rng.randrange(len(self.every)), rng.choice(list(FAULTS))
            self.device.plant(fault, rng.randint(1, 3))
            self.call(which, {fault: FAULTS[fault]})
            self.device.clear()
            self.call(which, {})
            if now > start + seconds / 4:
                debug.metal_counters()  # a log of what ran, which is let go
                made.append(self.calls)
                resident.append(memory.resident())
        slope = float(np.polyfit(made, resident, 1)[0]) if len(made) > 1 else 0.0
        self.outcome.lines.append(f"memory: {slope:+.0f} bytes a call, at most {BAR}")
        if slope > BAR:
            self.outcome.failures.append(f"calls leave {slope:.0f} bytes each")

    def at_once(self, seconds: float) -> None:
        """Threads, each of whose calls may fail by the faults of another."""
        end = time.monotonic() + seconds

        def work(thread: int) -> None:
            rng = random.Random(self.options.seed + 1 + thread)
            while time.monotonic() < end and not self.outcome.failures:
                if rng.random() < 0.5:
                    self.device.plant(rng.choice(list(FAULTS)), rng.randint(1, 3))
                self.call(rng.randrange(len(self.every)), FAULTS)

        with ThreadPoolExecutor(THREADS) as executor:
            list(executor.map(work, range(THREADS)))
        self.device.clear()
        for which in range(len(self.every)):
            self.call(which, {})


def run(options: Options) -> Outcome:
    outcome = Outcome()
    load = Load(options, problems.always("metal")[: options.always], outcome)
    load.at_first()
    load.one_after_the_other(options.seconds / 2)
    load.at_once(options.seconds / 2)
    errors = ", ".join(f"{load.errors[fault]} {fault}" for fault in (*AT_FIRST, *FAULTS))
    outcome.lines.insert(0, f"{load.calls:,} calls, errors: {errors}")
    for fault, words in (AT_FIRST | FAULTS).items():
        if words and not load.errors[fault]:
            outcome.failures.append(f"no error of {fault}")
    return outcome
