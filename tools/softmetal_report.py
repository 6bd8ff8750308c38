# ruff: noqa: E501 (lines of Markdown)
"""Writes docs/software-metal.md: what the software Metal device passes, from a run of its tests.

python tools/softmetal_report.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "softmetal"
PAGE = ROOT / "docs" / "software-metal.md"
INTRODUCTION = """# The software Metal device

`softmetal` runs Metal compute programs on Linux: `softmetal/README.md` says what it is, how it is built and
used, and what it is not. This page is written by `python tools/softmetal_report.py`, which runs the tests in
`tests/softmetal` (Debian 12, clang 19, x86-64). Nothing here was run on a Mac.

"""

# Code of others that was run as it is, by hand: it is not part of this repository.
OTHERS = """## Code of others

Run as they are, sources untouched:

| program | what was run | result |
|---|---|---|
| llama.cpp's Metal backend, host and kernels, with its `test-backend-ops` (0.3.8 of llama-cpp-python) | every operation that the backend claims, 45 s each: flash attention with float16, Q4_0 and Q8_0 keys, matrix products of all quantized formats, softmax, normalizations, copies | no mismatch with its CPU backend; flash attention and `MUL_MAT_ID` were stopped by the clock |
| metal-cpp | device, library with function constants, reflection, dispatch, events, residency set, errors | as expected |
| MLX 0.32 | `steel_attention`, `sdpa_vector` through Python | float32 error 4e-7 |
"""


def outcomes() -> dict[tuple[str, str], str]:
    """The result of each test, by its file and name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(TESTS), f"--junitxml={report}"],
            cwd=ROOT,
            check=False,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {
            (case.attrib["classname"].rsplit(".", 1)[-1], case.attrib["name"]): next(
                (child.tag for child in case if child.tag in ("failure", "error", "skipped")),
                "pass",
            )
            for case in cases
        }


def matching(
    results: dict[tuple[str, str], str], file: str, test: str
) -> Iterator[tuple[str, str]]:
    """Parameters and result of each case of a test."""
    for (module, name), result in results.items():
        found = re.fullmatch(rf"{test}(?:\[(.*)\])?", name, re.DOTALL)
        if module == file and found:
            yield (found[1] or name.removeprefix("test_")), result


def table(title: str, text: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"## {title}", "", text, "", "| | result |", "|---|---|"]
    for name, result in rows:
        shown = name.replace("|", "\\|").replace("\n", " ").replace("](", "] (")
        lines.append(f"| {shown} | {result} |")
    return "\n".join(lines) + "\n\n"


def main() -> int:
    sys.path.insert(0, str(TESTS))
    results = outcomes()
    messages = dict(re.findall(r'^MISUSE\((\w+),\s*"([^"]*)"', misuse_text(), re.MULTILINE))
    words = str.maketrans("_-", "  ")
    areas = sorted(path.stem for path in (TESTS / "language").glob("test_*.py"))
    page = INTRODUCTION
    page += table(
        "The language",
        "One small kernel with a known answer for each feature (`language/`).",
        [row for area in areas for row in matching(results, area, "test_feature")],
    )
    page += table(
        "Refused with a message",
        "What the device lacks or Metal does not allow (`language/test_refused.py`).",
        [
            (f"`{name}`", result)
            for name, result in matching(results, "test_refused", "test_refused")
        ],
    )
    page += table(
        "The host interface",
        "One test of a host program for each feature and fault (`host/*.mm`).",
        [
            (name.replace("-", ": ", 1).translate(words), result)
            for name, result in matching(results, "test_host", "test_program")
        ],
    )
    misuses = []
    for name, result in matching(results, "test_host", "test_misuse"):
        key = name.split("-", 1)[0]
        misuses.append((f"{key.translate(words)}: {messages.get(key, '')}", result))
    page += table(
        "Misuses",
        "Each ends the program with the message (`host/misuse.mm`); a pass says that it did.",
        misuses,
    )
    planted = [
        (re.sub(r"^keywords\d+-|\\\\", "", name).replace("\\", "").translate(words), result)
        for file, test in (
            ("test_executor", "test_planted_bug_is_told"),
            ("test_executor", "test_refused_dispatch"),
            ("test_sanitizers", "test_a_planted_bug_is_reported_at_its_line"),
            ("test_strict", "test_planted"),
        )
        for name, result in matching(results, file, test)
    ]
    page += table("Planted bugs", "In kernels: a pass says that the bug was reported.", planted)
    page += table(
        "Counters",
        "Work of kernels against closed forms (`test_counters.py`).",
        [
            (name.translate(words), result)
            for name, result in matching(results, "test_counters", r"test_\w+")
        ],
    )
    PAGE.write_text(page + OTHERS)
    failures = sum(result != "pass" for result in results.values())
    sys.stdout.write(f"{PAGE.name}: {len(results)} tests, {failures} did not pass\n")
    return 1 if failures else 0


def misuse_text() -> str:
    return (TESTS / "host" / "misuse.mm").read_text()


if __name__ == "__main__":
    sys.exit(main())
