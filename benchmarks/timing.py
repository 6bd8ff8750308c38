"""Processor time of calls on one core, for benchmarks that run in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def use_one_core() -> None:
    """Pins this process, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def processor_time(run: Callable[[], Any], calls: int) -> float:
    """Of a call, in seconds."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls
