"""Writes the folder that stands in for Apple's SDK: `sdk.py DOWNLOADS SDK`.

Its C headers and libc++ come from the `ziglang` wheel, its Foundation and Metal headers are those
of the software Metal device. Its libraries are lists of symbols: those that binaries made for macOS
import (symbols.py), and the reviewed ones (reviewed.py). Nothing of Apple's SDK is in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tools.macos import reviewed, symbols
from tools.macos.downloads import ZIG
from tools.macos.target import LLVM, TRIPLE

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "softmetal/include"
FRAMEWORKS = ("CoreFoundation", "Foundation", "Metal")
VERSION = "13.3"  # as its settings tell the compiler

# libc++ as macOS has it. Availability marks keep out what is newer than the minimum OS.
CONFIG_SITE = """\
#pragma once
#define _LIBCPP_ABI_VERSION 1
#define _LIBCPP_ABI_NAMESPACE __1
#define _LIBCPP_HAS_THREADS 1
#define _LIBCPP_HAS_MONOTONIC_CLOCK 1
#define _LIBCPP_HAS_TERMINAL 1
#define _LIBCPP_HAS_FILESYSTEM 1
#define _LIBCPP_HAS_RANDOM_DEVICE 1
#define _LIBCPP_HAS_LOCALIZATION 1
#define _LIBCPP_HAS_UNICODE 1
#define _LIBCPP_HAS_WIDE_CHARACTERS 1
#define _LIBCPP_HAS_TIME_ZONE_DATABASE 0
#define _LIBCPP_HAS_THREAD_API_PTHREAD 1
#define _LIBCPP_HAS_THREAD_API_EXTERNAL 0
#define _LIBCPP_HAS_THREAD_API_WIN32 0
#define _LIBCPP_HAS_THREAD_API_C11 0
#define _LIBCPP_HAS_MUSL_LIBC 0
#define _LIBCPP_LIBC_NEWLIB 0
#define _LIBCPP_INSTRUMENTED_WITH_ASAN 0
#define _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS 1
#define _LIBCPP_HARDENING_MODE_DEFAULT 2
#define _LIBCPP_ASSERTION_SEMANTIC_DEFAULT 2
#define _LIBCPP_PSTL_BACKEND_SERIAL
"""


def stub(library: str, names: Iterable[str], reexports: Iterable[str] = ()) -> str:
    """The text of a `.tbd` file: what the linker knows of `library`."""
    text = "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
    text += f"install-name: '{symbols.LIBRARIES[library]}'\n"
    for key, values in (("reexported-libraries", reexports), ("exports", names)):
        if listed := ", ".join(f"'{value}'" for value in sorted(values)):
            entry = "libraries" if key == "reexported-libraries" else "symbols"
            text += f"{key}:\n  - targets: [ arm64-macos ]\n    {entry}: [ {listed} ]\n"
    return text + "...\n"


def write(path: Path, text: str) -> None:
    """Leaves a file that is as wanted alone, for what is built of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_headers(downloads: Path, sdk: Path, headers: Path) -> None:
    zig = ZIG.folder(downloads) / "ziglang/lib"
    include = sdk / "usr/include"
    if not include.exists():
        partial = sdk / "include.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(zig / "libc/include/any-darwin-any", partial)
        shutil.copytree(zig / "libcxx/include", partial / "c++/v1")
        shutil.copytree(zig / "libcxxabi/include", partial / "c++/v1", dirs_exist_ok=True)
        include.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(include)
    write(include / "c++/v1/__config_site", CONFIG_SITE)
    # Zig gives these on its command line instead.
    for path in [include / "c++/v1/__config", *(include / "c++/v1/__configuration").glob("*.h")]:
        text = path.read_text()
        begin, patch, rest = text.partition("/* zig patch: instead of including __config_site")
        if patch:
            write(path, f"{begin}#include <__config_site>\n{rest.partition(chr(10))[2]}")
    for name in ("NSObject.h", "NSObjCRuntime.h"):
        write(include / "objc" / name, (headers / "objc" / name).read_text())
    for name in FRAMEWORKS:
        wanted = {path.name: path.read_text() for path in (headers / name).glob("*.h")}
        folder = sdk / f"System/Library/Frameworks/{name}.framework/Headers"
        for path in folder.glob("*.h"):
            if path.name not in wanted:
                path.unlink()
        for file_name, text in wanted.items():
            write(folder / file_name, text)


def write_libraries(sdk: Path, evidence: dict[str, symbols.Evidence]) -> None:
    names: dict[str, set[str]] = {library: set() for library in symbols.LIBRARIES}
    for symbol, found in evidence.items():
        names[found.library].add(symbol)
    for symbol, (library, _) in reviewed.IMPORTS.items():
        names[library].add(symbol)
    for library, install_name in symbols.LIBRARIES.items():
        # Foundation brings the runtime with it: native builds do not name libobjc.
        both = ("CoreFoundation", "libobjc") if library == "Foundation" else ()
        text = stub(library, names[library], [symbols.LIBRARIES[each] for each in both])
        path = sdk / install_name.lstrip("/").removesuffix(".dylib")
        write(path.with_name(path.name + ".tbd"), text)
        # Where the linker looks for a name on its command line.
        folder = path.parents[2] if library in FRAMEWORKS else path.parent
        write(folder.joinpath(f"{library}.tbd"), text)


def compile_platform_version(sdk: Path) -> None:
    source = Path(__file__).with_name("platform_version.c")
    target = sdk / "usr/lib/platform_version.o"
    command = [f"clang-{LLVM}", f"--target={TRIPLE}", "-isysroot"]
    command += [str(sdk), "-O2", "-fvisibility=hidden", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)


def write_sdk(downloads: Path, sdk: Path, headers: Path = HEADERS) -> None:
    sdk.mkdir(parents=True, exist_ok=True)
    write_headers(downloads, sdk, headers)
    write_libraries(sdk, symbols.load(downloads, downloads.with_name("imports.json")))
    compile_platform_version(sdk)
    settings = {"CanonicalName": f"macosx{VERSION}", "Version": VERSION}
    write(
        sdk / "SDKSettings.json",
        json.dumps(settings | {"MaximumDeploymentTarget": f"{VERSION}.99"}),
    )


if __name__ == "__main__":
    write_sdk(Path(sys.argv[1]), Path(sys.argv[2]))
