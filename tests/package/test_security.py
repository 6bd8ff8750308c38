"""What SECURITY.md says of the package's sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "jax_gluon").rglob("*.py"))
# By which a connection is opened, or what was read is run.
FORBIDDEN = {
    "ctypes", "ftplib", "http", "marshal", "pickle", "requests", "shelve", "smtplib", "socket",
    "urllib", "xmlrpc",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_fetched_or_run(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), node.lineno
        assert not {name.split(".")[0] for name in names} & FORBIDDEN, (names, node.lineno)


def test_environment_variables_are_those_that_are_named():
    read = {"HOME", "XDG_CACHE_HOME"}
    for path in MODULES:
        read |= set(re.findall(r"\bJAX_GLUON_[A-Z_]+\b", path.read_text()))
    for path in (ROOT / "plugin").rglob("*"):
        if path.suffix in (".cc", ".h", ".mm"):
            read |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text()))
    named = set(re.findall(r"`(JAX_GLUON_[A-Z_]+|HOME|XDG_CACHE_HOME)`", _text()))
    assert read == named


def test_the_build_asks_for_the_versions_that_are_said():
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert re.search(r'"jaxlib==[\d.]+"', requires)
    for requirement in re.findall(r'"(.*?)"', requires):
        assert re.search("==|>=.*,<", requirement), requirement


def _text() -> str:
    return (ROOT / "SECURITY.md").read_text()
