"""The build: which FFI headers it takes, and that no instruction set leaks out of its own file."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def run_cmake(tmp_path: Path, c_api: str | None) -> "subprocess.CompletedProcess[str]":
    """Runs CMake with a c_api.h of the given text; None: without any."""
    headers = tmp_path / "xla" / "ffi" / "api"
    headers.mkdir(parents=True)
    if c_api is not None:
        (headers / "c_api.h").write_text(c_api)
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    return subprocess.run(
        [
            cmake,
            *("-S", ROOT, "-B", tmp_path / "build"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DJAX_GLUON_FFI_INCLUDE_DIR={tmp_path}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_headers_of_ffi_api_0_1_configure(tmp_path):
    finished = run_cmake(tmp_path, "#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("c_api", "complaint"),
    [
        ("#define XLA_FFI_API_MINOR 2\n", "API 0.1 is needed"),
        ("#define XLA_FFI_API_MINOR 11\n", "API 0.1 is needed"),
        ("", "API 0.1 is needed"),
        (None, "does not exist"),
    ],
    ids=["minor 2", "minor 11", "no version", "no header"],
)
def test_other_headers_are_refused(tmp_path, c_api, complaint):
    finished = run_cmake(tmp_path, c_api)
    assert finished.returncode != 0
    assert complaint in " ".join(finished.stderr.split())


def weak_functions(symbols: str) -> set[str]:
    """Functions in `nm` output that the linker takes from whichever file comes first."""
    rows = (line.split(maxsplit=2) for line in symbols.splitlines())
    return {row[2] for row in rows if len(row) == 3 and row[1] in "Ww"}


def test_instruction_set_files_share_no_code_with_the_baseline():
    """A weak function compiled for AVX-512 could be linked into code that runs without it."""
    nm = shutil.which("nm")
    # Of this system: a wheel may have been built for another.
    folder = f"build/*-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    objects = {path.name: path for path in ROOT.glob(f"{folder}/CMakeFiles/_plugin.dir/**/*.o")}
    names = ("avx2", "avx512", "neon", "neon_dotprod", "neon_i8mm_bf16")
    variants = [objects[f"{name}.cc.o"] for name in names if f"{name}.cc.o" in objects]
    if nm is None or not variants:
        pytest.skip("needs nm and a build with variants in build/")

    def defined(path: Path) -> set[str]:
        finished = subprocess.run([nm, "-C", path], capture_output=True, text=True, check=True)
        return weak_functions(finished.stdout)

    assert defined(objects["module.cc.o"]), "nm shows the weak functions of pybind11 at least"
    for path in variants:
        assert defined(path) == set(), path.name


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_pool_under_a_sanitizer(sanitizer, tmp_path):
    """Helpers that start late were once a use after scope, which only a sanitizer sees."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    stub = tmp_path / "xla" / "ffi" / "api"
    stub.mkdir(parents=True)
    shutil.copy(SUPPORT / "pool" / "ffi.h", stub)
    program = tmp_path / "pool"
    flags = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    paths = [f"-I{ROOT / 'plugin'}", f"-I{tmp_path}"]
    source = SUPPORT / "pool" / "main.cc"
    subprocess.run([compiler, *flags, *paths, source, "-o", program, "-pthread"], check=True)
    finished = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "0 failures\n"


@pytest.mark.parametrize("interface", ["same", "other", None])
def test_a_metal_library_of_other_headers_is_refused(tmp_path, interface):
    """The two share structs and classes: nothing of such a library is called."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler, or no library to load")
    library, program = tmp_path / "library.so", tmp_path / "program"
    flags = ["-std=c++17", f"-I{ROOT / 'plugin'}"]
    sources = SUPPORT / "loader"
    given = [] if interface is None else [f'-DINTERFACE="{interface}"']
    subprocess.run(
        [compiler, *flags, *given, "-shared", "-fPIC", sources / "library.cc", "-o", library],
        check=True,
    )
    flags += [f'-DJAX_GLUON_METAL_LIBRARY="{library}"', '-DJAX_GLUON_METAL_INTERFACE="same"']
    loader = ROOT / "plugin" / "metal" / "loader.cc"
    subprocess.run(
        [compiler, *flags, sources / "main.cc", loader, "-o", program, "-ldl"], check=True
    )
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    if interface == "same":
        assert said == "found a stand-in\n"
    else:
        assert said.startswith(f'{library} is of another version than this plugin; "make metal"')


def test_the_interface_of_metal_is_that_of_its_headers(tmp_path):
    """Any change of a header that plugin and library share is another interface."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    plugin = tmp_path / "plugin"
    shutil.copytree(ROOT / "plugin", plugin, ignore=shutil.ignore_patterns("cpu", "ffi"))

    def interface():
        finished = subprocess.run(
            [cmake, "-P", plugin / "metal" / "interface.cmake"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return finished.stdout

    seen = [interface()]
    assert seen[0].strip()
    # What metal.h includes, of our own, and what that includes.
    shared = {"metal/metal.h"}
    while (
        found := {
            name
            for header in shared
            for name in re.findall(
                r'#include "(.+)"', (plugin / header).read_text(encoding="utf-8")
            )
        }
        - shared
    ):
        shared |= found
    assert len(shared) >= 3
    for header in sorted(shared):
        with (plugin / header).open("a", encoding="utf-8") as file:
            file.write("// other\n")
        seen.append(interface())
    assert len(set(seen)) == len(seen)
