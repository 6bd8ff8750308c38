"""Builds the sdist into dist/, looks at what it holds, and installs it in fresh environments.

Each Python that is named (else those of 3.12 and 3.13 that are found) gets an environment, in which
pip builds the package from the sdist alone and tests/package/smoke.py runs.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

if __package__:
    from tools.smoke_matrix import pyenv_python, run, version_of
else:
    from smoke_matrix import pyenv_python, run, version_of

ROOT = Path(__file__).resolve().parent.parent
#: What is at the top of the sdist.
CONTENTS = {
    "CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "SECURITY.md",
    "jax_gluon", "plugin", "pyproject.toml", "shaders",
}  # fmt: skip
VERSIONS = ("3.12", "3.13")


def build_sdist(folder: Path) -> Path:
    """The path of the sdist, built without an environment of its own."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-x", "-o", folder, ROOT)
    return max(folder.glob("jax_gluon-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def check_contents(sdist: Path) -> None:
    """Raises `SystemExit` where it holds what does not build the package, or lacks what does."""
    with tarfile.open(sdist) as archive:
        names = [Path(name).parts[1:] for name in archive.getnames()]
    found = {parts[0] for parts in names if parts}
    if found != {name for name in CONTENTS if (ROOT / name).exists() or name == "PKG-INFO"}:
        sys.exit(f"{sdist.name}: unlike {sorted(CONTENTS)}: {sorted(found ^ CONTENTS)}")
    binaries = [parts for parts in names if parts and parts[-1].endswith((".so", ".pyd", ".pyc"))]
    if binaries:
        sys.exit(f"{sdist.name} holds what was compiled: {binaries}")


def pythons() -> list[str]:
    """Interpreters of the versions, one of each that is found."""
    found = []
    for version in VERSIONS:
        for candidate in (f"python{version}", pyenv_python(version)):
            is_right = candidate and version_of(candidate) == tuple(map(int, version.split(".")))
            if candidate and is_right:
                found.append(candidate)
                break
    return found


def install(python: str, sdist: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        fresh = Path(folder) / "bin" / "python"
        run(fresh, "-m", "pip", "install", "--quiet", f"jax-gluon @ {sdist.resolve().as_uri()}")
        # Not from the checkout, whose package has no plugin for this Python.
        run(fresh, "-I", ROOT / "tests" / "package" / "smoke.py", cwd=folder)
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    print(f"{sdist.name}: installed and run in {version.stdout.strip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", help="interpreters, else those found of 3.12, 3.13")
    chosen = parser.parse_args().pythons or pythons()
    if not chosen:
        sys.exit(f"no Python of {' or '.join(VERSIONS)} was found: name one")
    sdist = build_sdist(ROOT / "dist")
    check_contents(sdist)
    for python in chosen:
        install(python, sdist)


if __name__ == "__main__":
    main()
