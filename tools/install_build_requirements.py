"""Installs what builds the package into the running environment, for `pip --no-build-isolation`.

Of jaxlib only the FFI headers are wanted, and the environment holds another jaxlib to run with: its
wheel is downloaded and the headers alone are unpacked, into the folder named on the command line.
"""

import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = "jaxlib/include/xla/ffi/"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def unpack_headers(requirement: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder, requirement)
        (wheel,) = Path(folder).glob("jaxlib-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(HEADERS)]
            archive.extractall(target, members)


def main() -> None:
    (target,) = sys.argv[1:]
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements: list[str] = tomllib.load(file)["build-system"]["requires"]
    (jaxlib,) = (r for r in requirements if r.startswith("jaxlib"))
    pip("install", "--quiet", "cmake", "ninja", *(r for r in requirements if r != jaxlib))
    unpack_headers(jaxlib, Path(target))


if __name__ == "__main__":
    main()
