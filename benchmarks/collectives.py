"""What a compiled program sends, counted in its text (of CPUs and of GPUs)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_SIZES = {"f32": 4, "u32": 4, "bf16": 2, "u16": 2, "f16": 2, "s32": 4, "s8": 1, "u8": 1, "pred": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def sent(compiled: Any) -> int:
    """Bytes of the operands of collective permutes, those in loops once for each turn."""
    return _count(compiled.as_text(), "collective-permute")


def sent_by_all(compiled: Any, devices: int) -> float:
    """Bytes that a device sends in all collectives but reductions to all."""
    text = compiled.as_text()
    whole = _count(text, "all-gather") + _count(text, "all-to-all")
    scattered = _count(text, "reduce-scatter") * devices
    return sent(compiled) + (whole + scattered) * (devices - 1) / devices


def _count(text: str, operation: str) -> int:
    """Bytes of the results of an operation; of one in two parts those of its end."""
    computations: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else None
            computations[name] = []
            if entry:
                computations[""] = computations[name]
        elif name:
            computations[name].append(line)

    def of(name: str) -> int:
        total = 0
        for line in computations[name]:
            if re.search(rf" {operation}(-done)?\(", line):
                result = line.split(f" {operation}")[0].split("=", 1)[1]
                total += sum(
                    _SIZES[dtype] * int(np.prod([int(x) for x in extents.split(",") if x]))
                    for dtype, extents in _ARRAY.findall(result)
                )
            elif match := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += int(trips[1]) * of(match[1])
            elif match := re.search(r"to_apply=%?([\w.\-]+)", line):
                total += of(match[1]) if " call(" in line else 0
        return total

    return of("")
