"""Host programs in Objective-C++: features, errors, misuses, faults, examples."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "host"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "softmetal" / "examples"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")

# Settings that a test is run with.
ENVIRONMENT = {
    "time_limit": {"SOFTMETAL_TIME_LIMIT": "0.2"},
    "time_limit_of_an_event": {"SOFTMETAL_TIME_LIMIT": "0.2"},
}


def cases_of(name: str) -> list[str]:
    return re.findall(r"^TEST\((\w+)\)", (HERE / f"{name}.mm").read_text(), re.MULTILINE)


def misuses() -> Iterator[tuple[str, str]]:
    """Each misuse with the message that it must end with."""
    text = (HERE / "misuse.mm").read_text()
    strings = r'(?:"(?:[^"\\]|\\.)*"\s*)+'
    for match in re.finditer(rf"^MISUSE\((\w+),\s*({strings})\)", text, re.MULTILINE):
        yield match[1], "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', match[2]))


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )


def build(device: Path, source: Path, program: Path, *options: object) -> Path:
    command = (device / "softmetal", "clang++", *WARNINGS, *options, source, "-o", program)
    finished = run(*command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return program


@pytest.fixture(scope="session")
def programs(device: Path, tmp_path_factory: pytest.TempPathFactory):
    """Builds each host program once."""
    folder = tmp_path_factory.mktemp("host")
    built: dict[str, Path] = {}

    def program(name: str) -> Path:
        if name not in built:
            options = ("-O1", "-fobjc-arc", "-I", ROOT)
            built[name] = build(device, HERE / f"{name}.mm", folder / name, *options)
        return built[name]

    return program


@pytest.fixture(scope="session")
def saxpy_library(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library compiled ahead of time."""
    output = tmp_path_factory.mktemp("library") / "default.metallib"
    finished = run(device / "softmetal", "compile", EXAMPLES / "saxpy.metal", "-o", output)
    assert finished.returncode == 0, finished.stderr
    return output


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (name, test)
        for name in ("foundation", "device", "library", "commands")
        for test in cases_of(name)
    ],
)
def test_program(programs, saxpy_library, program, test):
    environment = ENVIRONMENT.get(test, {}) | {"SOFTMETAL_TEST_LIBRARY": str(saxpy_library)}
    finished = run(programs(program), test, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{test}: ok\n"


@pytest.mark.parametrize(("name", "message"), list(misuses()))
def test_misuse(programs, name, message):
    finished = run(programs("misuse"), name)
    assert finished.returncode == -signal.SIGABRT
    assert "failed assertion" in finished.stderr
    assert message in finished.stderr
    # The same as an exception, for programs that go on.
    finished = run(programs("misuse"), name, SOFTMETAL_VALIDATION="error")
    assert finished.returncode == 3, finished.stderr
    assert message in finished.stdout


def test_no_misuse(programs):
    assert run(programs("misuse"), "no_misuse").returncode == 0


def test_faults_of_the_environment(programs):
    finished = run(programs("device"), "identity", SOFTMETAL_FAULT="nil_device")
    assert finished.returncode == 1
    assert "device()" in finished.stderr
    finished = run(programs("device"), "identity", SOFTMETAL_FAULT="no_such_fault:2")
    assert finished.returncode == -signal.SIGABRT
    assert "no_such_fault" in finished.stderr


# --- The examples of the README, as it builds them ---


@pytest.mark.parametrize("name", ["saxpy", "matmul"])
def test_example(device, tmp_path, name):
    options = ("-fobjc-arc", "-framework", "Foundation", "-framework", "Metal")
    program = build(device, EXAMPLES / f"{name}.mm", tmp_path / name, *options)
    finished = run(program, EXAMPLES / f"{name}.metal")
    assert finished.returncode == 0, finished.stderr
    assert "all right" in finished.stdout
    # Wrong arithmetic is found: the example compares with its own.
    wrong = (EXAMPLES / f"{name}.metal").read_text()
    changed = wrong.replace("fma(a, x[i], y[i])", "fma(a, x[i], 0)").replace("k += 8", "k += 16")
    assert changed != wrong
    (tmp_path / "wrong.metal").write_text(changed)
    assert run(program, tmp_path / "wrong.metal").returncode == 1


def test_example_with_a_default_library(device, saxpy_library, tmp_path):
    program = build(
        device, EXAMPLES / "saxpy.mm", tmp_path / "saxpy", "-fobjc-arc", "-framework", "Metal"
    )
    shutil.copy(saxpy_library, tmp_path / "default.metallib")
    finished = run(program)
    assert finished.returncode == 0, finished.stderr


# --- The command-line program ---


def test_reflect(device, saxpy_library):
    import json

    for path in (saxpy_library, EXAMPLES / "saxpy.metal"):
        declared = json.loads(run(device / "softmetal", "reflect", path).stdout)
        (kernel,) = declared["kernels"]
        assert kernel["name"] == "saxpy"
        assert [each["name"] for each in kernel["arguments"]] == ["x", "y", "a", "i"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "missing.metal", "-o", "x"), "cannot read missing.metal"),
        (("compile", EXAMPLES / "saxpy.metal"), "-o FILE.metallib"),
        (("compile", EXAMPLES / "saxpy.metal", "-o"), "-o needs a value"),
        (("compile", EXAMPLES / "saxpy.metal", "--fast"), "unknown option --fast"),
        (("reflect",), "no file"),
        (("reflect", EXAMPLES / "saxpy.metal", "--instrument", "x"), "allowed: none, counters"),
        (("reflect", EXAMPLES / "saxpy.mm"), "error:"),
        ((), "usage:"),
        (("other",), "usage:"),
    ],
)
def test_bad_command_line(device, arguments, message):
    finished = run(device / "softmetal", *arguments)
    assert finished.returncode in (1, 2)
    assert message in finished.stderr
