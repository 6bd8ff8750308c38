"""A fault of meaning: a text of a source file, what replaces it, and tests that are to fail."""

from __future__ import annotations

from typing import NamedTuple

OFF_BY_ONE = "mask off by one"
RESCALE = "dropped rescale"
STALE = "stale maximum"
SIGN = "wrong sign"
INDEX = "swapped index"
HEAD = "wrong head"
GROUP = "wrong scale group"
TAIL = "lost tail"
BITS = "wrong stream of dropout bits"
FACTOR = "missing factor"
TERM = "lost term"
ROUNDING = "wrong rounding"
BARRIER = "missing barrier"


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; `tests` are arguments of pytest."""

    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def domain(self) -> str:
        """What has to be built anew: "cpu" (the plugin), "host" (Metal's), or nothing."""
        if self.file.startswith("shaders/"):
            return "shaders"
        if self.file.endswith(".mm"):
            return "host"
        return "cpu" if self.file.startswith("plugin/") else "python"

    def applied(self, text: str) -> str:
        """The file's text with the fault; `ValueError` where the old text does not occur once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {count} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)
