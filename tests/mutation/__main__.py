"""`python -m tests.mutation`: plants faults one at a time, and says which the tests catch.

Works on a copy of the checkout under build/mutation, whose package its tests import. A test that
fails without any fault would catch all: the one that failed is run again so.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.mutation.catalogue import FAULTS
from tests.mutation.fault import Fault

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "mutation"
TREE = FOLDER / "tree"
METAL = TREE / "build" / "metal"
LIBRARY = METAL / "libjax_gluon_metal.so"
WHOLE = FOLDER / "whole"  # what was built without a fault
_SETS = ("AVX2", "AVX512", "AMX")  # as CMake names them
_prepared: list[tuple[str, list[str]]] = []  # what was built last
# pytest's status of tests that failed; of a process that a signal ended it is negative.
_FAILED, _OUT_OF_TIME, _LIMIT_SECONDS = 1, "out of time", 1200
# An editable package is found by a finder of its own, before any path.
_SITE = """import sys
sys.meta_path[:] = [x for x in sys.meta_path if type(x).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, {tree!r})
"""


class BuildError(Exception):
    """A fault with which the sources do not compile."""


def copy_checkout() -> None:
    """The files that git knows of, where they differ; builds stay."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for path in [*TREE.rglob("*.py"), *TREE.rglob("*.h"), *TREE.rglob("*.cc")]:
        name = path.relative_to(TREE)
        if name.parts[0] != "build" and not (ROOT / name).exists():
            path.unlink()
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, TREE / name
        if not source.is_file():
            continue
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    site = FOLDER / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE.format(tree=str(TREE)))


def install_plugin() -> None:
    """That of this environment, with all its instruction sets."""
    found = importlib.util.find_spec("jax_gluon._plugin")
    if found is None or found.origin is None:
        sys.exit("python -m tests.mutation: no compiled plugin is installed")
    shutil.copy(found.origin, TREE / "jax_gluon")


def _native() -> list[str]:
    """The instruction sets that tests can force here, beside the portable one."""
    has = importlib.import_module("jax_gluon._plugin").cpu_isas_supported()
    return [name for name in _SETS if name.lower() in has]


def _run(*command: str) -> None:
    finished = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
    if finished.returncode != 0:
        raise BuildError((finished.stdout + finished.stderr)[-2000:])


def _build_plugin(sets: list[str]) -> None:
    """The plugin of the copy, with few instruction sets and little optimised."""
    folder = "-".join(["build/plugin", *sets]).lower()
    headers = ROOT / ".venv" / "ffi-headers" / "jaxlib" / "include"
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    _run(
        "cmake", "-S", ".", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Mutation",
        # The portable kernels alone compile in a fifth of the time without optimisation.
        f"-DCMAKE_CXX_FLAGS_MUTATION={'-O1' if sets else '-O0'} -DNDEBUG",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}", f"-DJAX_GLUON_FFI_INCLUDE_DIR={headers}",
        f"-DJAX_GLUON_METAL_LIBRARY={LIBRARY}",
        *(f"-DJAX_GLUON_COMPILER_HAS_{name}=OFF" for name in _SETS if name not in sets),
    )  # fmt: skip
    _run("cmake", "--build", folder, "-j", str(os.cpu_count()))
    (plugin,) = (TREE / folder).glob("_plugin*.so")
    shutil.copy(plugin, TREE / "jax_gluon")


def _build_metal() -> None:
    clang = os.environ.get("SOFTMETAL_CLANG", "clang++-19")
    _run("sh", "tools/build_softmetal.sh", str(METAL), clang)


def prepare(domain: str, sets: list[str]) -> None:
    """What the tests of a domain need, without a fault."""
    install_plugin()
    if domain == "host":
        _build_metal()
    if domain in ("host", "cpu"):  # Metal's tests need a plugin that finds the copy's library
        _build_plugin(sets)
    shutil.rmtree(WHOLE, ignore_errors=True)
    WHOLE.mkdir()
    for path in _built(domain):
        shutil.copy(path, WHOLE)


def _built(domain: str) -> list[Path]:
    """What a fault of the domain is compiled into."""
    if domain == "host":
        return [LIBRARY]
    return list((TREE / "jax_gluon").glob("_plugin*.so")) if domain == "cpu" else []


def build(domain: str, sets: list[str]) -> None:
    """Builds what a fault of the domain is in. Tests of shaders read the shaders themselves."""
    if domain == "host":
        _build_metal()
    elif domain == "cpu":
        _build_plugin(sets)


def run_tests(tests: tuple[str, ...]) -> tuple[int | str, str]:
    """pytest's status, or that it took too long; the first test that failed."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER / "site")}
    # No fault is in the device itself: without a build of the checkout, tests make their own.
    device = ROOT / "build" / "metal"
    if (device / "libsoftmetal.so").exists():
        environment["SOFTMETAL_BUILD_DIR"] = str(device)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    with (FOLDER / "log").open("w+") as log:
        # In a session of its own, so that all it has started ends with it.
        process = subprocess.Popen(
            command, cwd=TREE, env=environment, start_new_session=True, stdout=log, stderr=log
        )
        try:
            status: int | str = process.wait(_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = _OUT_OF_TIME
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        lines = [line for line in log if line.startswith(("FAILED ", "ERROR tests/"))]
    return status, lines[0].split(" ", 1)[1].split(" - ")[0].strip() if lines else ""


def _outcome(fault: Fault, sets: list[str]) -> str:
    path = TREE / fault.file
    text = path.read_text()
    path.write_text(fault.applied(text))
    try:
        build(fault.domain, sets)
        status, failed = run_tests(fault.tests)
    except BuildError as error:
        return f"does not compile: {error}"
    finally:
        path.write_text(text)
    if status == 0:
        return "survived"
    if isinstance(status, str) or status > _FAILED:
        return str(status) if isinstance(status, str) else f"pytest ended with {status}"
    # Without the fault the test passes: only that one is run so.
    for built in _built(fault.domain):
        shutil.copy(WHOLE / built.name, built)
    without, _ = run_tests((failed,) if failed else fault.tests)
    return "caught" if without == 0 else f"without it as well: {failed}"


def outcome(fault: Fault) -> str:
    """ "caught", "survived", or why there is no answer; the file is as before afterwards.

    The portable kernels are compiled fastest: others are where those do not show the fault.
    """
    attempts: list[list[str]] = [[]]
    if fault.domain == "cpu" and _native():
        attempts.append(_native())
    result = ""
    for sets in attempts:
        if _prepared != [(fault.domain, sets)]:
            prepare(fault.domain, sets)
            _prepared[:] = [(fault.domain, sets)]
        result = _outcome(fault, sets)
        if result != "survived":
            break
    return result


def key_of(fault: Fault) -> str:
    """By which its outcome is remembered: the fault, its file, and the files of its tests."""
    files = [fault.file, *(name for name in fault.tests if name.endswith(".py"))]
    text = repr(tuple(fault)) + "".join((ROOT / name).read_text() for name in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chosen(options: argparse.Namespace) -> list[Fault]:
    faults = [
        fault
        for fault in FAULTS
        if fault.domain in options.domains and options.only in f"{fault.kind} {fault.file}"
    ]
    if options.every > 1:  # of each kind in each domain its share
        groups: dict[tuple[str, str], list[Fault]] = collections.defaultdict(list)
        for fault in faults:
            groups[fault.domain, fault.kind].append(fault)
        ordered = [fault for group in groups.values() for fault in group]
        faults = ordered[:: options.every]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    domains = ("python", "shaders", "host", "cpu")
    parser.add_argument("--domains", nargs="+", choices=domains, default=domains)
    parser.add_argument("--only", default="", help="of these letters in its kind or file")
    parser.add_argument("--every", type=int, default=1, help="every n-th, of each kind its share")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its tests end with it
    known: dict[str, str] = {}
    if options.results.exists():
        known = json.loads(options.results.read_text())

    copy_checkout()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for fault in chosen(options):
        key, start = key_of(fault), time.perf_counter()
        if known.get(key) != "caught":
            known[key] = outcome(fault)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(known, indent=1))
        counts[fault.kind, known[key]] += 1
        seconds = time.perf_counter() - start
        line = fault.old.strip().splitlines()[0]
        print(f"{known[key]:9} {seconds:5.0f} s  {fault.kind}: {fault.file}: {line}", flush=True)
    print()
    for kind in sorted({kind for kind, _ in counts}):
        of_kind = {result: n for (each, result), n in counts.items() if each == kind}
        print(f"{kind}: " + ", ".join(f"{n} {result}" for result, n in sorted(of_kind.items())))
    caught = sum(n for (_, result), n in counts.items() if result == "caught")
    print(f"{caught} of {sum(counts.values())} caught")
    sys.exit(caught != sum(counts.values()))


if __name__ == "__main__":
    main()
