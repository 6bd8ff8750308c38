"""What binaries for macOS import of the system's libraries, and from which macOS on it is there.

A binary that asks for macOS 11.0 and imports a symbol (not weakly) shows that 11.0 has it.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.macos.target import LLVM

# dyld's name of each library that the plugin may load, by the name that `nm` shows.
_FRAMEWORKS = "/System/Library/Frameworks"
LIBRARIES = {
    "libSystem": "/usr/lib/libSystem.B.dylib",
    "libc++": "/usr/lib/libc++.1.dylib",
    "libobjc": "/usr/lib/libobjc.A.dylib",
    "CoreFoundation": f"{_FRAMEWORKS}/CoreFoundation.framework/Versions/A/CoreFoundation",
    "Foundation": f"{_FRAMEWORKS}/Foundation.framework/Versions/C/Foundation",
    "Metal": f"{_FRAMEWORKS}/Metal.framework/Versions/A/Metal",
}


@dataclass(frozen=True)
class Evidence:
    """A symbol's library, and the oldest macOS that a binary which needs the symbol asks for."""

    library: str
    since: tuple[int, int]
    binary: str


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def minimum_os(binary: Path) -> tuple[int, int]:
    headers = _run(
        f"llvm-objdump-{LLVM}", "--macho", "--arch=arm64", "--private-headers", str(binary)
    )
    version = re.search(r"minos (\d+)\.(\d+)", headers)
    if version is None:
        raise ValueError(f"{binary} does not say which macOS it needs")
    return int(version[1]), int(version[2])


def imports(binary: Path) -> dict[str, str]:
    """Library of each symbol that `binary` needs; weak imports, which may be absent, are not."""
    table = _run(f"llvm-nm-{LLVM}", "-m", "-u", "--arch=arm64", str(binary))
    rows = re.findall(r"\(undefined\) external (\S+) \(from ([^)]+)\)", table)
    names = {**{name: name for name in LIBRARIES}, "libobjc.A": "libobjc", "libc++.1": "libc++"}
    names |= {"libSystem.B": "libSystem"}
    return {symbol: names[library] for symbol, library in rows if library in names}


def collect(folder: Path) -> dict[str, Evidence]:
    """The evidence in every binary under `folder`."""
    found: dict[str, Evidence] = {}
    for binary in sorted([*folder.rglob("*.so"), *folder.rglob("*.dylib")]):
        since = minimum_os(binary)
        for symbol, library in imports(binary).items():
            if symbol not in found or since < found[symbol].since:
                found[symbol] = Evidence(library, since, str(binary.relative_to(folder)))
    return found


def load(folder: Path, cache: Path) -> dict[str, Evidence]:
    """`collect(folder)`, kept in `cache` for as long as the binaries are the same."""
    binaries = sorted(
        (str(path), path.stat().st_size)
        for pattern in ("*.so", "*.dylib")
        for path in folder.rglob(pattern)
    )
    key = json.dumps(binaries)
    if cache.exists():
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return {
                symbol: Evidence(library, (major, minor), binary)
                for symbol, (library, (major, minor), binary) in kept["symbols"].items()
            }
    found = collect(folder)
    symbols = {symbol: list(asdict(evidence).values()) for symbol, evidence in found.items()}
    cache.write_text(json.dumps({"key": key, "symbols": symbols}))
    return found


def flat_imports(binary: Path) -> set[str]:
    """Symbols that `binary` takes from whichever library has them."""
    table = _run(f"llvm-nm-{LLVM}", "-m", "-u", "--arch=arm64", str(binary))
    return set(re.findall(r"external (\S+) \(dynamically looked up\)", table))
