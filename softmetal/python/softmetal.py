"""Metal kernels on numpy arrays: compiles Metal text and runs it on the software device.

>>> import numpy as np, softmetal
>>> library = softmetal.Library('''
... #include <metal_stdlib>
... kernel void twice(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
...   x[i] *= 2;
... }''')
>>> x = np.arange(4, dtype=np.float32)
>>> library.kernel("twice")(grid=1, threads=4, buffers=[x]).threads
4
>>> x
array([0., 2., 4., 6.], dtype=float32)
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INSTRUMENTATIONS = ("none", "counters", "address", "thread", "undefined")
_SLOTS = 31


class Error(RuntimeError):
    """What the compiler or the device says."""


@dataclasses.dataclass(frozen=True)
class Counters:
    """Work of one dispatch.

    Barriers and operations count once for each threadgroup or simdgroup that goes through them.
    Products and exponentials are counted in libraries compiled with `instrumentation="counters"`.
    """

    device_bytes_read: int
    device_bytes_written: int
    device_bytes_read_unique: int
    device_bytes_written_unique: int
    threadgroup_bytes_read: int
    threadgroup_bytes_written: int
    threadgroup_memory_peak: int
    multiply_accumulates: int
    exp2: int
    threadgroup_barriers: int
    simdgroup_barriers: int
    simdgroup_operations: int
    threads: int
    fiber_switches: int


_COUNTERS = tuple(field.name for field in dataclasses.fields(Counters))


class _Constant(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("index", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("value", ctypes.c_void_p),
    )


class _CompileRequest(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("macros", ctypes.c_char_p),
        ("include_directories", ctypes.c_char_p),
        ("output", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("instrumentation", ctypes.c_int),
        ("safe_math", ctypes.c_int),
        ("language_version", ctypes.c_uint32),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("lengths", ctypes.POINTER(ctypes.c_uint64)),
        ("threadgroup", ctypes.POINTER(ctypes.c_uint32)),
        ("grid", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("grid_in_threads", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
    )


def _load() -> ctypes.CDLL:
    folder = os.environ.get("SOFTMETAL_BUILD_DIR")
    if not folder:
        raise Error("softmetal: SOFTMETAL_BUILD_DIR does not name the folder of libsoftmetal.so")
    # Images that are loaded later look for the executor's functions among the global symbols.
    library = ctypes.CDLL(str(pathlib.Path(folder) / "libsoftmetal.so"), mode=ctypes.RTLD_GLOBAL)
    library.softmetal_image_open.restype = ctypes.c_void_p
    library.softmetal_image_json.restype = ctypes.c_size_t
    return library


_library: ctypes.CDLL | None = None


def _device() -> ctypes.CDLL:
    global _library
    if _library is None:
        _library = _load()
    return _library


def _bytes_of(value: Any, type_name: str) -> bytes:
    """A function constant's value as the bytes of its Metal type."""
    types = {
        "bool": np.uint8, "char": np.int8, "uchar": np.uint8, "short": np.int16,
        "ushort": np.uint16, "int": np.int32, "uint": np.uint32, "long": np.int64,
        "ulong": np.uint64, "half": np.float16, "float": np.float32, "size_t": np.uint64,
        "int8_t": np.int8, "uint8_t": np.uint8, "int16_t": np.int16, "uint16_t": np.uint16,
        "int32_t": np.int32, "uint32_t": np.uint32, "int64_t": np.int64, "uint64_t": np.uint64,
    }  # fmt: skip
    scalar = type_name.rstrip("234") if type_name not in types else type_name
    if scalar == "bfloat":
        array = np.asarray(value)
        if array.dtype != np.uint16:  # else bits
            bits = np.asarray(array, np.float32).view(np.uint32)
            array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return array.tobytes()
    if scalar not in types:
        raise Error(f"softmetal: function constants of type {type_name} are not known")
    array = np.asarray(value).astype(types[scalar])
    raw = array.tobytes()
    # A vector of three takes the room of four.
    return raw + bytes(array.itemsize) if array.size == 3 else raw


def _request(
    source: str | pathlib.Path,
    macros: Mapping[str, Any] | None,
    include: Sequence[str | pathlib.Path],
    std: str | None,
) -> _CompileRequest:
    """The text, its name, macros and folders, as the library takes them."""
    name, folders = "program_source", [str(x) for x in include]
    if isinstance(source, str) and source.endswith(".metal") and "\n" not in source:
        source = pathlib.Path(source)
    if isinstance(source, pathlib.Path):
        folders.insert(0, str(source.parent))
        name, source = str(source), source.read_text(encoding="utf-8")
    version = 0
    if std is not None:
        found = re.fullmatch(r"metal(\d)\.(\d)", std)
        if not found:
            raise Error(f'softmetal: std is "{std}"; allowed: metal2.3, metal3.1 and the like.')
        version = int(found[1]) << 16 | int(found[2])
    definitions = "\n".join(f"{key}={value}" for key, value in (macros or {}).items())
    return _CompileRequest(
        source=source.encode(),
        name=name.encode(),
        macros=definitions.encode(),
        include_directories="\n".join(folders).encode(),
        language_version=version,
    )


def check(
    source: str | pathlib.Path,
    *,
    macros: Mapping[str, Any] | None = None,
    include: Sequence[str | pathlib.Path] = (),
    std: str | None = None,
) -> None:
    """Compiles Metal text strictly: its address spaces are checked too.

    Takes what `Library` takes. No image is made.

    **Raises:** `Error` with the diagnostics, at lines of the Metal text.
    """
    text = ctypes.create_string_buffer(1 << 20)
    request = _request(source, macros, include, std)
    if _device().softmetal_check(ctypes.byref(request), text, ctypes.c_size_t(len(text))) != 0:
        raise Error(text.value.decode(errors="replace"))


class Library:
    """Metal text, compiled.

    **Arguments:**

    - `source`: the text, or the path of a file `*.metal`.
    - `macros`: preprocessor definitions; `include`: folders.
    - `std`: the version of the language, "metal3.1"; default the newest.
    - `fast_math`: as Metal's compiler has it unless it is told not to.
    - `instrumentation`: one of `INSTRUMENTATIONS`; default what SOFTMETAL_INSTRUMENT says, else
      none.

    **Raises:** `Error` with the compiler's diagnostics, at lines of the Metal text.
    """

    def __init__(
        self,
        source: str | pathlib.Path,
        *,
        macros: Mapping[str, Any] | None = None,
        include: Sequence[str | pathlib.Path] = (),
        std: str | None = None,
        fast_math: bool = True,
        instrumentation: str | None = None,
    ) -> None:
        chosen = instrumentation or os.environ.get("SOFTMETAL_INSTRUMENT") or "none"
        if chosen not in INSTRUMENTATIONS:
            raise Error(
                f'softmetal.Library: instrumentation is "{chosen}"; allowed: '
                f"{', '.join(INSTRUMENTATIONS)}."
            )
        text = ctypes.create_string_buffer(1 << 20)
        request = _request(source, macros, include, std)
        request.instrumentation = INSTRUMENTATIONS.index(chosen)
        request.safe_math = not fast_math
        status = _device().softmetal_compile(
            ctypes.byref(request), text, ctypes.c_size_t(len(text))
        )
        if status != 0:
            raise Error(text.value.decode(errors="replace"))
        self.image_path = text.value.decode()
        self._declared: dict[str, Any] | None = None

    @property
    def declared(self) -> dict[str, Any]:
        """Kernels with their arguments, and function constants."""
        if self._declared is None:
            image = _Image(self.image_path, {}, {})
            self._declared = image.declared()
        return self._declared

    def kernel(self, name: str, constants: Mapping[int | str, Any] | None = None) -> Kernel:
        """A kernel with function constants, each by index or name."""
        return Kernel(self, name, constants or {})


class _Image:
    """An opened image: a private copy with constants of its own."""

    def __init__(
        self, path: str, constants: Mapping[int | str, Any], types: Mapping[int | str, str]
    ) -> None:
        values = [(key, _bytes_of(value, types[key])) for key, value in constants.items()]
        array = (_Constant * max(len(values), 1))()
        for entry, (key, raw) in zip(array, values, strict=False):
            entry.name = key.encode() if isinstance(key, str) else None
            entry.index = key if isinstance(key, int) else 0
            entry.size = len(raw)
            entry.value = ctypes.cast(ctypes.c_char_p(raw), ctypes.c_void_p)
        text = ctypes.create_string_buffer(1 << 16)
        self.handle = _device().softmetal_image_open(
            path.encode(), array, len(values), text, len(text)
        )
        if not self.handle:
            raise Error(text.value.decode(errors="replace"))
        weakref.finalize(self, _device().softmetal_image_close, ctypes.c_void_p(self.handle))

    def declared(self) -> dict[str, Any]:
        handle = ctypes.c_void_p(self.handle)
        size = _device().softmetal_image_json(handle, None, ctypes.c_size_t(0))
        text = ctypes.create_string_buffer(size)
        _device().softmetal_image_json(handle, text, ctypes.c_size_t(size))
        return json.loads(text.value)


class Kernel:
    """A kernel of a library, ready to be dispatched."""

    def __init__(self, library: Library, name: str, constants: Mapping[int | str, Any]) -> None:
        declared = library.declared
        if name not in (kernel["name"] for kernel in declared["kernels"]):
            names = ", ".join(kernel["name"] for kernel in declared["kernels"])
            raise Error(f'softmetal: no kernel "{name}"; the library has: {names or "none"}')
        types: dict[int | str, str] = {}
        for constant in declared["function_constants"]:
            types[constant["index"]] = types[constant["name"]] = constant["type"]
        for key in constants:
            if key not in types:
                raise Error(f"softmetal: the library has no function constant {key!r}")
        self.name = name
        self._image = _Image(library.image_path, constants, types)

    def __call__(
        self,
        *,
        grid: int | Sequence[int],
        threads: int | Sequence[int],
        buffers: Sequence[np.ndarray | bytes | None] = (),
        threadgroup_memory: Mapping[int, int] | None = None,
        grid_in_threads: bool = False,
        seed: int = 0,
        workers: int = 0,
        time_limit: float = 0.0,
    ) -> Counters:
        """Runs the kernel and waits for it.

        **Arguments:**

        - `grid`: threadgroups along each axis, or with `grid_in_threads` threads.
        - `threads`: of a threadgroup.
        - `buffers`: bound to [[buffer(0)]] and the following; arrays in place, None leaves a slot
          empty.
        - `threadgroup_memory`: bytes of [[threadgroup(i)]] by i.
        - `seed`: of the order in which threads run; 0 is their own.
        - `workers`: host threads that share the threadgroups; 0 is one per core.
        - `time_limit`: seconds after which the dispatch is abandoned; 0 is none.

        **Raises:** `Error` where a check of the device fails.
        """
        if len(buffers) > _SLOTS:
            raise Error(f"softmetal: {len(buffers)} buffers; allowed: up to {_SLOTS}")
        request = _Request()
        request.kernel = self.name.encode()
        addresses = (ctypes.c_void_p * _SLOTS)()
        lengths = (ctypes.c_uint64 * _SLOTS)()
        keep: list[Any] = []
        for slot, buffer in enumerate(buffers):
            if buffer is None:
                continue
            if isinstance(buffer, bytes):
                buffer = np.frombuffer(buffer, np.uint8).copy()
            if not isinstance(buffer, np.ndarray) or not buffer.flags.c_contiguous:
                raise Error(f"softmetal: buffer {slot} is not a contiguous array")
            keep.append(buffer)
            addresses[slot] = buffer.ctypes.data
            lengths[slot] = buffer.nbytes
        request.buffers, request.lengths = addresses, lengths
        memory = (ctypes.c_uint32 * _SLOTS)()
        for slot, size in (threadgroup_memory or {}).items():
            memory[slot] = size
        request.threadgroup = memory
        for field, given in (("grid", grid), ("threads_per_threadgroup", threads)):
            sizes = [given] if isinstance(given, int) else list(given)
            getattr(request, field)[:] = [*sizes, 1, 1][:3]
        request.grid_in_threads = grid_in_threads
        request.seed, request.workers, request.time_limit = seed, workers, time_limit
        counters = (ctypes.c_uint64 * len(_COUNTERS))()
        text = ctypes.create_string_buffer(4096)
        status = _device().softmetal_dispatch(
            ctypes.c_void_p(self._image.handle), ctypes.byref(request), counters, text,
            ctypes.c_size_t(len(text)),
        )  # fmt: skip
        if status != 0:
            raise Error(text.value.decode(errors="replace"))
        return Counters(**dict(zip(_COUNTERS, counters, strict=True)))


SANITIZERS = {
    # Python allocates once and for all; what a kernel leaks is not the device's to say.
    "address": ("asan", {"ASAN_OPTIONS": "detect_leaks=0"}),
    # The host's own threads are not instrumented.
    "thread": ("tsan", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}),
    "undefined": ("ubsan_standalone", {"UBSAN_OPTIONS": "print_stacktrace=1"}),
}


def sanitizer_environment(name: str) -> dict[str, str]:
    """Environment variables with which a program's kernels run under a sanitizer of clang.

    **Arguments:** `name`: one of `SANITIZERS`. Options that the environment has already, in
    ASAN_OPTIONS and its like, come after the ones set here.

    **Raises:** `Error` where the sanitizer's runtime is not installed.
    """
    if name not in SANITIZERS:
        raise Error(f'softmetal: sanitizer is "{name}"; allowed: {", ".join(SANITIZERS)}.')
    runtime, options = SANITIZERS[name]
    clang = os.environ.get("SOFTMETAL_CLANG") or "clang++-19"
    library = f"libclang_rt.{runtime}-{platform.machine()}.so"
    found = subprocess.run(
        [clang, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not pathlib.Path(found).is_file():
        raise Error(f"softmetal: {clang} has no {library}; on Debian: libclang-rt-19-dev")
    environment = {**os.environ, "SOFTMETAL_INSTRUMENT": name, "LD_PRELOAD": found}
    for variable, value in options.items():
        environment[variable] = ":".join(filter(None, (value, os.environ.get(variable))))
    return environment


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m softmetal check FILE.metal`, `... run --sanitize thread -- program ...`."""
    parser = argparse.ArgumentParser(prog="python -m softmetal", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a program with its kernels under a sanitizer")
    run.add_argument("--sanitize", choices=SANITIZERS, required=True)
    run.add_argument("program", nargs="+", help="after --")
    checked = commands.add_parser("check", help="compile a file strictly")
    checked.add_argument("file", type=pathlib.Path)
    checked.add_argument("-I", dest="include", action="append", default=[], metavar="FOLDER")
    checked.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    checked.add_argument("--std", metavar="metal3.1")
    options = parser.parse_args(arguments)
    if options.command == "check":
        split = (macro.partition("=") for macro in options.macros)
        macros = {name: value if equals else "1" for name, equals, value in split}
        try:
            check(options.file, macros=macros, include=options.include, std=options.std)
        except Error as error:
            sys.stderr.write(str(error))
            return 1
        return 0
    environment = sanitizer_environment(options.sanitize)
    return subprocess.run(options.program, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
