"""clang-tidy over plugin/: `python tools/tidy.py BUILD...`.

Sources are read as the builds compile them: those of plugin/cpu/, which choose by processor, in
each build, others in the first that has them. A build that is not there is passed over.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "plugin" / "cpu"
# Of GCC's commands, what clang does not know.
OPTIONS = [
    "--quiet",
    "--removed-arg=-fno-predictive-commoning",
    "--extra-arg=-Wno-unknown-warning-option",
    "--extra-arg=-Wno-ignored-optimization-argument",
]


def sources(build: Path) -> set[Path]:
    database = build / "compile_commands.json"
    if not database.exists():
        return set()
    files = {Path(each["file"]) for each in json.loads(database.read_text())}
    return {path for path in files if path.is_relative_to(ROOT / "plugin")}


def tidy(build: Path, source: Path) -> bool:
    command = [Path(sys.executable).with_name("clang-tidy"), *OPTIONS, "-p", build, source]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    passed = finished.returncode == 0
    print(f"{'ok' if passed else 'FAILED':<7} {source.relative_to(ROOT)} in {build}", flush=True)
    if not passed:
        print(finished.stdout + finished.stderr, flush=True)
    return passed


def main() -> None:
    todo: list[tuple[Path, Path]] = []
    seen: set[Path] = set()
    for build in map(Path, dict.fromkeys(sys.argv[1:])):
        found = sources(build)
        todo += [(build, source) for source in found if source.parent == CPU or source not in seen]
        seen |= found
    if not todo:
        sys.exit(f"no compile_commands.json with sources of plugin/ in {sys.argv[1:]}")
    # The longest first: those that hold a processor's kernels.
    todo.sort(key=lambda each: (each[1].parent != CPU, each))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(lambda each: tidy(*each), todo))
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
