"""The plugin as a Mach-O file: what it is, what it loads, exports and carries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import lief

from plugin.metal.embed_shaders import flat
from tools.macos.gate.result import Result
from tools.macos.gate.wheel import Wheel
from tools.macos.symbols import LIBRARIES, flat_imports

_EXPORTS = {"_PyInit__plugin"}
_PYTHON = re.compile(r"__?Py[A-Z_]")


def parse(path: Path) -> lief.MachO.Binary:
    fat = lief.MachO.parse(str(path))
    binary = fat.take(lief.MachO.Header.CPU_TYPE.ARM64) if fat is not None else None
    if binary is None:
        raise ValueError(f"{path} is not a Mach-O file for arm64")
    return binary


def check_header(binary: lief.MachO.Binary, minimum_os: tuple[int, int]) -> Result:
    header, version = binary.header, binary.build_version
    wanted = ".".join(map(str, minimum_os))
    problems = []
    if header.file_type != lief.MachO.Header.FILE_TYPE.BUNDLE:
        problems.append(f"the file is a {header.file_type}, expected a BUNDLE")
    if version is None or version.platform != lief.MachO.BuildVersion.PLATFORMS.MACOS:
        problems.append("the platform is not macOS")
    elif tuple(version.minos[:2]) != minimum_os:
        found = ".".join(map(str, version.minos[:2]))
        problems.append(f"the minimum OS is {found}, expected the tag's {wanted}")
    return Result("header", f"a bundle for arm64, macOS {wanted} and later", tuple(problems))


def check_libraries(binary: lief.MachO.Binary) -> Result:
    found = {str(library.name) for library in binary.libraries}
    expected = set(LIBRARIES.values())
    problems = [f"{name} is loaded" for name in sorted(found - expected)]
    problems += [f"{name} is not loaded" for name in sorted(expected - found)]
    if binary.has_rpath:
        problems.append("there is a run path")
    return Result("libraries", f"{len(found)} of the system", tuple(problems))


def check_exports(binary: lief.MachO.Binary) -> Result:
    found = {str(symbol.name) for symbol in binary.exported_symbols}
    problems = [f"{name} is exported" for name in sorted(found - _EXPORTS)]
    problems += [f"{name} is not exported" for name in sorted(_EXPORTS - found)]
    return Result("exports", ", ".join(sorted(_EXPORTS)), tuple(problems))


def check_flat_imports(path: Path) -> Result:
    """Symbols that any library may give: Python's alone, for the linker lets every name through."""
    found = flat_imports(path)
    others = sorted(name for name in found if not _PYTHON.match(name))
    problems = tuple(f"{name} is in no library that the plugin is linked with" for name in others)
    return Result("flat imports", f"{len(found) - len(others)} of Python", problems)


def _content_problems(content: bytes, root: Path) -> Iterator[str]:
    for shader in sorted((root / "shaders").glob("*.metal")):
        if flat(shader, set()).encode() not in content:
            yield f"the text of {shader.name} is missing"
    if b"portable" not in content:
        yield "the portable CPU kernels are missing"
    for word in (b"softmetal", b"SOFTMETAL", b"libjax_gluon_metal.so", str(root).encode()):
        if word in content:
            yield f"there is a {word.decode()!r} in it"


def check_content(wheel: Wheel, root: Path) -> Result:
    count = len(list((root / "shaders").glob("*.metal")))
    problems = tuple(_content_problems(wheel.members[wheel.plugin], root))
    return Result(
        "plugin", f"{count} shaders, CPU kernels, nothing of the software device", problems
    )
