"""The wheel as an archive: its tags, its record, and what is in it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

from tools.macos.gate.result import Result
from tools.macos.target import MINIMUM_OS

_NAME = re.compile(
    r"(?P<name>\w+)-(?P<version>[\w.]+)-(?P<tag>(?P<python>cp3\d+)-cp3\d+-(?P<platform>\w+))\.whl"
)


@dataclass(frozen=True)
class Wheel:
    """An unpacked wheel."""

    path: Path
    members: dict[str, bytes]

    @property
    def python(self) -> str:
        """As in cp313."""
        return self._name["python"]

    @property
    def tag(self) -> str:
        return self._name["tag"]

    @property
    def minimum_os(self) -> tuple[int, int]:
        version = re.fullmatch(r"macosx_(\d+)_(\d+)_arm64", self._name["platform"])
        if version is None:
            raise ValueError(f"{self.path.name} is not for macOS on arm64")
        return int(version[1]), int(version[2])

    @property
    def plugin(self) -> str:
        return f"jax_gluon/_plugin.cpython-{self.python.removeprefix('cp')}-darwin.so"

    @property
    def metadata(self) -> str:
        """The folder of the wheel's own files."""
        return f"{self._name['name']}-{self._name['version']}.dist-info"

    @property
    def _name(self) -> re.Match[str]:
        name = _NAME.fullmatch(self.path.name)
        if name is None:
            raise ValueError(f"{self.path.name} is no wheel of a plugin")
        return name


def read(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        return Wheel(path, {name: archive.read(name) for name in archive.namelist()})


def check_tags(wheel: Wheel) -> Result:
    fields = Parser().parsestr(wheel.members[f"{wheel.metadata}/WHEEL"].decode())
    problems = []
    if fields.get_all("Tag") != [wheel.tag]:
        problems.append(f"WHEEL says {fields.get_all('Tag')}, the file's name {wheel.tag}")
    if fields["Root-Is-Purelib"] != "false":
        problems.append("WHEEL says that the wheel is pure Python")
    if wheel.minimum_os != MINIMUM_OS:
        found, expected = (".".join(map(str, each)) for each in (wheel.minimum_os, MINIMUM_OS))
        problems.append(f"the wheel is for macOS {found}, expected {expected}")
    return Result("tags", wheel.tag, tuple(problems))


def _content_problems(wheel: Wheel, package: Path) -> Iterator[str]:
    # Modules and stubs.
    sources = {f"jax_gluon/{p.relative_to(package)}" for p in package.rglob("*.py*")}
    sources = {name for name in sources if name.endswith((".py", ".pyi"))}
    expected = sources | {"jax_gluon/py.typed", wheel.plugin}
    found = {name for name in wheel.members if not name.startswith(wheel.metadata)}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} does not belong here" for name in sorted(found - expected))
    for name, content in wheel.members.items():
        if content.startswith(b"\x7fELF"):
            yield f"{name} is a binary for Linux"
    for name in sorted(sources & found):
        if wheel.members[name] != package.parent.joinpath(name).read_bytes():
            yield f"{name} differs from the source tree's"


def check_contents(wheel: Wheel, package: Path) -> Result:
    problems = tuple(_content_problems(wheel, package))
    return Result("contents", f"{len(wheel.members)} files, as in {package.name}/", problems)


def check_record(wheel: Wheel) -> Result:
    record = f"{wheel.metadata}/RECORD"
    problems = []
    rows = list(csv.reader(io.StringIO(wheel.members[record].decode())))
    for name, digest, size in rows:
        if name == record:
            continue
        content = wheel.members.get(name, b"")
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if (digest, size) != (f"sha256={sha256}", str(len(content))):
            problems.append(f"{name} is not what RECORD says")
    if {row[0] for row in rows} != set(wheel.members):
        problems.append("RECORD and the archive name different files")
    return Result("record", f"{len(rows)} entries, SHA-256", tuple(problems))
