"""What a part is asked for, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """`problems` are drawn from `seed`, beside the first `always` that are always there."""

    seconds: float = 60.0
    calls: int = 20_000
    seed: int = 0
    problems: int = 24
    always: int = 6
    #: Bytes that each call of "memory" leaks, to see that the bar notices.
    leak: int = 0


@dataclass
class Outcome:
    """`lines` say what was counted; without `failures` the part passed."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
