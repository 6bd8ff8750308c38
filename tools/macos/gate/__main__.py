"""Checks a wheel for macOS without a Mac: `python -m tools.macos.gate WHEEL`.

Prints a table of checks; the exit status is 1 where one fails. docs/macos.md says what they prove.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tools.arm64 import instructions
from tools.macos import symbols
from tools.macos.downloads import MLX, PYOBJC
from tools.macos.gate import (
    binary,
    enumerators,
    imports,
    interface,
    messages,
    metal_cpp,
    pyobjc,
    signature,
    wheel,
)
from tools.macos.gate.result import Result, table
from tools.macos.target import LLVM

ROOT = Path(__file__).resolve().parents[3]
MACOS = ROOT / "build/macos"


def load_oracles(macos: Path = MACOS) -> messages.Oracles:
    downloads = macos / "downloads"
    return messages.Oracles(
        pyobjc.load([each.folder(downloads) for each in PYOBJC]),
        metal_cpp.load(
            MLX.folder(downloads) / "mlx/include/metal_cpp",
            macos / "sdk",
            ROOT / "softmetal/include",
        ),
    )


def check_plugin(given: wheel.Wheel, plugin: Path) -> list[Result]:
    """What the compiled file shows by itself."""
    parsed = binary.parse(plugin)
    evidence = symbols.load(MACOS / "downloads", MACOS / "imports.json")
    return [
        binary.check_header(parsed, given.minimum_os),
        binary.check_libraries(parsed),
        binary.check_exports(parsed),
        binary.check_flat_imports(plugin),
        imports.check(plugin, evidence, given.minimum_os),
        binary.check_content(given, ROOT),
        signature.check(plugin),
    ]


def check_interface(plugin: Path, build: Path) -> list[Result]:
    """What the declarations show that the file was compiled with."""
    ours, oracles = interface.read(build), load_oracles()
    return [
        messages.check_sent(binary.parse(plugin), ours, oracles),
        messages.check_declared(ours, oracles),
        messages.check_functions(set(symbols.imports(plugin)), ours, oracles.pyobjc),
        enumerators.check(ours, oracles.pyobjc, oracles.metal_cpp),
    ]


def check_instructions(build: Path) -> Result:
    """What the objects hold that not every Mac runs."""
    evidence, problems = instructions.check(build, instructions.macos(LLVM))
    return Result("instructions", evidence, tuple(problems))


def check_wheel(path: Path) -> list[Result]:
    given = wheel.read(path)
    results = [
        wheel.check_tags(given),
        wheel.check_contents(given, ROOT / "jax_gluon"),
        wheel.check_record(given),
    ]
    if given.plugin not in given.members:
        return results
    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder, "plugin.so")
        plugin.write_bytes(given.members[given.plugin])
        results += check_plugin(given, plugin)
        results += check_interface(plugin, ROOT / "build" / given.tag)
        results.append(check_instructions(ROOT / "build" / given.tag))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    results = check_wheel(parser.parse_args().wheel)
    print(table(results))
    sys.exit(any(result.problems for result in results))


if __name__ == "__main__":
    main()
