"""Each symbol that the plugin imports is one that its minimum OS has."""

from __future__ import annotations

from pathlib import Path

from tools.macos import reviewed, symbols
from tools.macos.gate.result import Result


def check(
    plugin: Path, evidence: dict[str, symbols.Evidence], minimum_os: tuple[int, int]
) -> Result:
    imports = symbols.imports(plugin)
    problems, unproved = [], set()
    for name, library in sorted(imports.items()):
        known = evidence.get(name)
        if known is not None and known.library != library:
            problems.append(f"{name} is taken from {library}, elsewhere from {known.library}")
        if known is not None and known.since <= minimum_os:
            continue
        unproved.add(name)
        if name not in reviewed.IMPORTS:
            since = (
                "none imports it"
                if known is None
                else f"{known.binary} needs macOS {known.since[0]}"
            )
            problems.append(f"{name} ({library}) is not known on macOS {minimum_os[0]}: {since}")
    stale = sorted(set(reviewed.IMPORTS) - unproved)
    problems += [f"{name} is in reviewed.IMPORTS without need" for name in stale]
    evident = len(imports) - len(unproved)
    text = f"{evident} that other wheels import on macOS {minimum_os[0]}, {len(unproved)} reviewed"
    return Result("imports", text, tuple(problems))
