"""Instructions beyond what a system's processors all have stand only behind the choice.

Read from the objects that a build left: disassembled, none but the variants' own hold such an
instruction, and there only functions that no other file can be linked with; what calls them is one
function for each, which none but the choosing file names.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_DOT = re.compile(r"^[su]dot$")
_MATRIX = re.compile(r"^(us|su)dot$|^(s|u|us)mmla$|^bf(dot|mmla|mlal[bt]?|cvtn?2?)$")
# Of ARMv8.1 to 8.4 besides: atomics and so on.
_ATOMIC = r"((ld|st)(add|clr|set|eor|[su]max|[su]min)|swp|casp?)a?l?[bh]?"
_LATER = re.compile(rf"^({_ATOMIC}|crc32c?[bhwx]|sqrdml[as]h|fml[as]l2?|ldapr[bh]?)$")
# Of each variant's object: what it may hold.
VARIANTS = {"neon_dotprod.cc": (_DOT,), "neon_i8mm_bf16.cc": (_DOT, _MATRIX)}
CHOICE = "device.cc"


class System(NamedTuple):
    objdump: str
    nm: str
    # What no processor of the system is sure to have.
    beyond: tuple[re.Pattern[str], ...]

    def holds(self, found: Iterable[str], allowed: tuple[re.Pattern[str], ...] = ()) -> list[str]:
        """Of the mnemonics, those beyond the base that are not allowed."""
        beyond = [x for x in self.beyond if x not in allowed]
        return sorted(each for each in found if any(x.match(each) for x in beyond))


LINUX = System("aarch64-linux-gnu-objdump", "aarch64-linux-gnu-nm", (_DOT, _MATRIX, _LATER))


def macos(llvm: str) -> System:
    """The first Mac with such a processor, M1, has dot products and atomics."""
    return System(f"llvm-objdump-{llvm}", f"llvm-nm-{llvm}", (_MATRIX,))


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def functions(path: Path, system: System) -> dict[str, set[str]]:
    """The mnemonics of each. GNU's lines are "address: word mnemonic", LLVM's lack the word."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in _lines(system.objdump, "-d", path):
        if match := re.match(r"[0-9a-f]+ <(.+)>:", line):
            name = match[1]
        elif match := re.match(r"\s*[0-9a-f]+:\s+(?:[0-9a-f]{8}\s+)?([a-z][a-z0-9]*)", line):
            found.setdefault(name, set()).add(match[1])
    return found


def check_object(
    name: str, found: dict[str, set[str]], symbols: Iterable[str], system: System
) -> list[str]:
    """Of an object's functions and `nm` lines."""
    allowed = VARIANTS.get(name, ())
    problems = []
    if beyond := system.holds(set().union(*found.values()), allowed):
        problems.append(f"{name} holds {', '.join(beyond)}")
    rows = [line.split() for line in symbols]
    shared = {row[2] for row in rows if len(row) == 3 and row[1] in "TWVSu"}
    held = {x: system.holds(found.get(x, ())) for x in sorted(shared) if "_kernels" not in x}
    problems += [f"{name} shares {x}, which holds {', '.join(held[x])}" for x in held if held[x]]
    return problems


def check_choice(symbols: dict[str, list[str]]) -> list[str]:
    """Of `nm` lines of each object: who names the function that is a variant's."""
    problems = []
    for variant in VARIANTS:
        function = f"{variant.removesuffix('.cc')}_kernelsEv"
        named = {name for name, lines in symbols.items() if any(function in x for x in lines)}
        if others := sorted(named - {variant, CHOICE}):
            problems.append(f"{', '.join(others)} names {function}")
        if not named >= {variant, CHOICE}:
            problems.append(f"{CHOICE} does not choose {variant}")
    return problems


def check(build: Path, system: System) -> tuple[str, list[str]]:
    """What was compared, and the problems."""
    paths = {path.name[:-2]: path for path in build.glob("CMakeFiles/_plugin.dir/plugin/**/*.o")}
    if missing := [name for name in (*VARIANTS, CHOICE) if name not in paths]:
        return "", [f"{build} has no {', '.join(missing)}.o"]
    symbols = {name: _lines(system.nm, path) for name, path in paths.items()}
    problems = check_choice(symbols)
    for name, path in paths.items():
        found = functions(path, system)
        if not set().union(*found.values()) & {"ret", "b"}:
            problems.append(f"{name} could not be disassembled")
        problems += check_object(name, found, symbols[name], system)
        for pattern in VARIANTS.get(name, ()):
            if not any(map(pattern.match, set().union(*found.values()))):
                problems.append(f"{name} lacks the instructions that it is for")
    where = ", ".join(name for name, x in VARIANTS.items() if set(x) & set(system.beyond))
    return f"{len(paths)} objects disassembled; beyond the base only in {where}", problems
