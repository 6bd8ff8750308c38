"""Loads one binary per Python under several releases of JAX; each runs tests/package/smoke.py.

The wheel of the running Python meets the oldest supported JAX and two later ones. The newest JAX
may need a later Python: it is met by the wheel of one that is found (3.13, else 3.12 or 3.14; the
variable PYTHON313 names one elsewhere), or else of this one.
Each pair has an environment of its own under .venvs/.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venvs"


class Release(NamedTuple):
    name: str
    requirements: tuple[str, ...]
    newest_python: tuple[int, int]  # the last that this jaxlib has wheels for


# NumPy releases that came long after an old JAX can't be expected to run it.
RELEASES = (
    Release("0.5.0", ("jax==0.5.0", "numpy<2.3"), (3, 13)),
    Release("0.8", ("jax==0.8.*",), (3, 14)),
    Release("0.10", ("jax==0.10.*",), (3, 14)),
)
NEWEST = Release("newest", ("jax",), (3, 99))


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def version_of(python: str) -> tuple[int, int] | None:
    """Minor version of an interpreter that starts and has venv, else None."""
    program = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = answer.stdout.split()
    return int(major), int(minor)


def pyenv_python(version: str) -> str | None:
    """The interpreter of a version that pyenv manages but has not put on PATH."""
    if shutil.which("pyenv") is None:
        return None
    names = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    for name in names.stdout.split():
        if name.startswith(version + "."):
            prefix = subprocess.run(["pyenv", "prefix", name], capture_output=True, text=True)
            return str(Path(prefix.stdout.strip()) / "bin" / "python")
    return None


def other_python() -> str | None:
    """A Python of a later minor version than this one, 3.13 by preference."""
    candidates = [os.environ.get("PYTHON313")]
    for version in ("3.13", "3.12", "3.14"):
        candidates += [f"python{version}", pyenv_python(version)]
    for candidate in candidates:
        version = version_of(candidate) if candidate else None
        if candidate and version and version > sys.version_info[:2]:
            return candidate
    return None


def build_wheel(python: str | Path, folder: Path, *options: str) -> Path:
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, *options, ROOT)
    (wheel,) = folder.glob("jax_gluon-*.whl")
    return wheel


def environment(python: str, name: str) -> Path:
    """The interpreter of the environment `name`, made with `python` when missing."""
    folder = ENVIRONMENTS / name
    inside = folder / "bin" / "python"
    if not inside.exists():
        run(python, "-m", "venv", folder)
    return inside


def smoke(python: str, release: Release, wheel: Path) -> None:
    major, minor = version_of(python) or (0, 0)
    print(f"-- jax {release.name} under Python {major}.{minor}", flush=True)
    inside = environment(python, f"jax-{release.name}-python{major}.{minor}")
    run(inside, "-m", "pip", "install", "--quiet", "--upgrade", *release.requirements)
    run(inside, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    # Away from the source tree, so that the installed wheel alone can be imported.
    run(inside, ROOT / "tests" / "package" / "smoke.py", cwd=ENVIRONMENTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--headers", help="XLA FFI headers; given, pip builds without isolation")
    arguments = parser.parse_args()

    later_python = other_python()
    releases = [r for r in RELEASES if sys.version_info[:2] <= r.newest_python]
    if later_python is None:
        releases.append(NEWEST)
    options: list[str] = []
    if arguments.headers:
        headers = Path(arguments.headers).resolve()
        define = f"--config-settings=cmake.define.JAX_GLUON_FFI_INCLUDE_DIR={headers}"
        options = ["--no-build-isolation", define]
    ENVIRONMENTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(sys.executable, Path(folder), *options)
        for release in releases:
            smoke(sys.executable, release, wheel)

    if later_python is None:
        print("-- no later Python found: the newest JAX is the newest for this one")
        return
    with tempfile.TemporaryDirectory() as folder:
        # Its own pip builds in isolation, as a user's `pip install` does.
        major, minor = version_of(later_python) or (0, 0)
        builder = environment(later_python, f"build-python{major}.{minor}")
        smoke(later_python, NEWEST, build_wheel(builder, Path(folder)))


if __name__ == "__main__":
    main()
