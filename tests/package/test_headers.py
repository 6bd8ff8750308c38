"""Every header of plugin/ compiles by itself, whatever its includers include before it.

Those that a source includes before all else do, or the plugin would not have been built.
"""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]


def included_first(source: Path) -> str:
    """The header that a source includes before any other, of the system's too."""
    includes = re.search(r"^#include (.*)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return includes[1].strip('"') if includes else ""


BUILT = {included_first(source) for source in ROOT.glob("plugin/**/*.cc")}
HEADERS = [
    path
    for path in sorted(path.relative_to(ROOT / "plugin") for path in ROOT.glob("plugin/**/*.h"))
    if path.as_posix() not in BUILT
]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "cpu/simd/avx2.h": AVX2,
    "cpu/simd/avx512.h": [
        *AVX2,
        *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vnni", "bf16")),
    ],
}
# Metal's headers are Objective-C++; the software device has what they include of Apple's.
METAL = ["-std=c++20", "-xobjective-c++", "-fobjc-runtime=macosx-12", "-fblocks", "-fobjc-arc",
         "-Ishaders", "-isystem", "softmetal/include"]  # fmt: skip


def compiles(compiler: str, flags: "list[str]") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [compiler, "-fsyntax-only", "-Iplugin", "-I.", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def is_of_metal(header: Path) -> bool:
    return header.parts[0] == "metal"


@pytest.mark.parametrize("header", [x for x in HEADERS if not is_of_metal(x)], ids=str)
def test_a_header_compiles_alone(header):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    extra = FLAGS.get(header.as_posix(), [])
    if extra and compiles(compiler, [*extra, "-xc++", "/dev/null"]).returncode != 0:
        pytest.skip(f"the compiler does not know {extra[-1]}")
    language = ["-std=c++17", "-isystem", jax.ffi.include_dir(), *extra, "-xc++"]
    finished = compiles(compiler, [*language, f"plugin/{header}"])
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("header", [x for x in HEADERS if is_of_metal(x)], ids=str)
def test_a_header_of_metal_compiles_alone(header):
    compiler = shutil.which("clang++-19")
    if compiler is None:
        pytest.skip("no clang++-19")
    finished = compiles(compiler, [*METAL, f"plugin/{header}"])
    assert finished.returncode == 0, finished.stderr
