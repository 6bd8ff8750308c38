"""What the package is made of: the stub of the extension, and one set of settings for wheels."""

import ast
import inspect
import re
import tomllib
from pathlib import Path

from jax_gluon import _native

ROOT = Path(__file__).resolve().parents[2]


def test_the_stub_is_of_the_extension():
    """Names, parameters in their order, and types of constants."""
    plugin = _native.plugin()
    body = ast.parse((ROOT / "jax_gluon" / "_plugin.pyi").read_text()).body
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
    constants = {
        node.target.id: ast.unparse(node.annotation).split("[")[0]
        for node in body
        if isinstance(node, ast.AnnAssign)
    }
    public = {name: x for name, x in vars(plugin).items() if not name.startswith("__")}
    assert {name for name, x in public.items() if callable(x)} == set(functions)
    assert {n: type(x).__name__ for n, x in public.items() if not callable(x)} == constants
    for name, parameters in functions.items():
        # pybind11 says them in the first line alone.
        signature = inspect.getdoc(public[name]).splitlines()[0]
        taken = re.search(r"\((.*)\) ->", signature)[1]
        assert re.findall(r"(\w+): ", taken) == parameters, name


def test_wheels_are_of_the_pythons_that_are_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    least = project["project"]["requires-python"].removeprefix(">=")
    built = project["tool"]["cibuildwheel"]["build"]
    assert built[0] == f"cp{least.replace('.', '')}-*"
