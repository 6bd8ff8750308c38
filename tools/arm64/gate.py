"""Checks a wheel for Linux on arm64, and tags it: `python -m tools.arm64.gate WHEEL FOLDER`.

The oldest systems that auditwheel finds it to run on become its tag.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from tools.arm64 import instructions

ROOT = Path(__file__).resolve().parents[2]
# Those of glibc 2.27, as jaxlib's.
EXPECTED = "manylinux_2_27_aarch64"
ELF_AARCH64 = 183


def run(*command: str | Path) -> str:
    module = [sys.executable, "-m", *command]
    return subprocess.run(module, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    wheel: Path = arguments.wheel
    problems = []
    with zipfile.ZipFile(wheel) as archive:
        (plugin,) = (name for name in archive.namelist() if name.endswith(".so"))
        header = archive.read(plugin)[:20]
    if header[:4] != b"\x7fELF" or int.from_bytes(header[18:20], "little") != ELF_AARCH64:
        problems.append(f"{plugin} is not an ELF file for arm64")
    if not re.search(r"\.cpython-3\d+-aarch64-linux-gnu\.so$", plugin):
        problems.append(f"{plugin} has another system's suffix")
    shown = " ".join(run("auditwheel", "show", wheel).split())
    tag = re.search(r'following platform tag: "(\w+)"', shown)
    found = tag[1] if tag else "none"
    if found != EXPECTED:
        problems.append(f"the tag is {found}, expected {EXPECTED}")
    build = ROOT / "build" / "-".join(wheel.stem.split("-")[2:])
    evidence, more = instructions.check(build, instructions.LINUX)
    problems += more
    if not problems:
        # It loads the system's libraries alone: there is nothing to repair but the name.
        arguments.folder.mkdir(exist_ok=True)
        tagged = run("wheel", "tags", "--platform-tag", EXPECTED, wheel).split()[-1]
        wheel.with_name(tagged).replace(arguments.folder / tagged)
        print(f"ok  tag  {EXPECTED}\nok  instructions  {evidence}")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
