"""Times functions beside each other, and says how sure it is: what else a machine does is no news.

Contenders are timed in turn, round after round, and compared within a round, so that what slows
all of them down cancels. What slows down some is seen as spread between rounds, and more rounds
are timed; where they do not settle it, the outcome is not sure.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

#: The clock, in seconds.
perf_counter = time.perf_counter

_Name = TypeVar("_Name", bound=Hashable)

#: With fewer rounds not even all of them bound the median with the confidence that is asked for.
MIN_ROUNDS = 5
#: Rounds are added until there are as many times those that were asked for.
_MOST = 4
#: The ends of the interval of a ratio may differ by this much of the lower one.
MAX_SPREAD = 0.15
#: Chance that the median lies outside of its interval.
_DOUBT = 0.1
#: Of so many calls the median leaves out one that something else came into; not waited for where
#: they take this many times as long as a turn should.
_CALLS, _SLOW = 3, 10.0


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median of a ratio over rounds, and where it lies, with a confidence of 90 %."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval is narrow."""
        return self.high <= self.low * (1.0 + MAX_SPREAD)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


@dataclasses.dataclass(frozen=True)
class Comparison(Generic[_Name]):
    """Seconds of each contender in each round."""

    times: Mapping[_Name, list[float]]

    def ratio(self, name: _Name, other: _Name) -> Ratio:
        """Time of `name` over that of `other`, round by round."""
        pairs = zip(self.times[name], self.times[other], strict=True)
        return _median([a / b for a, b in pairs])

    def seconds(self) -> dict[_Name, float]:
        """Of each contender: the median of the first, and of the others their ratio to it."""
        first = next(iter(self.times))
        scale = statistics.median(self.times[first])
        return {name: scale * self.ratio(name, first).median for name in self.times}

    def fastest(self, names: list[_Name]) -> _Name:
        """The fastest of some contenders; the first of those that are equal."""
        seconds = self.seconds()
        return min(names, key=seconds.__getitem__)


def _median(values: list[float]) -> Ratio:
    """The median, and an interval of order statistics, which assumes nothing of the values."""
    ordered, n = sorted(values), len(values)
    cut, chance = -1, 0.0
    while cut < n // 2:
        chance += 2.0 * math.comb(n, cut + 1) / 2.0**n
        if chance > _DOUBT:
            break
        cut += 1
    cut = max(cut, 0)
    return Ratio(statistics.median(ordered), ordered[cut], ordered[n - 1 - cut], n)


def compare(
    contenders: Mapping[_Name, Callable[[], object]],
    is_settled: Callable[[Comparison[_Name]], bool],
    *,
    rounds: int,
    least: float,
) -> Comparison[_Name]:
    """Times the contenders, each for `least` seconds a round, until `is_settled`.

    At least `rounds` rounds, and at most four times as many.
    """
    for run in contenders.values():
        run()  # compiles
    times: dict[_Name, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for done in range(1, _MOST * rounds + 1):
        # There and back, so that none always follows the same one.
        for name in names if done % 2 else reversed(names):
            contenders[name]()  # takes what the one before has left in caches and allocator
            times[name].append(_turn(contenders[name], least))
        if done % rounds == 0 and is_settled(Comparison(times)):
            break
    return Comparison(times)


def _turn(run: Callable[[], object], least: float) -> float:
    """The median seconds of calls that take `least` together: of three at least, if not slow."""
    calls: list[float] = []
    start = now = perf_counter()
    while not calls or now - start < least * (_SLOW if len(calls) < _CALLS else 1.0):
        before = now
        run()
        now = perf_counter()
        calls.append(now - before)
    return statistics.median(calls)
