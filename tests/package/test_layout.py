"""What the layout promises: no import circles, files of one sitting, private names."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jax_gluon"
PUBLIC = {"debug", "equinox", "flax", "keras", "linen", "nnx", "reference"}
MAX_LINES = 500


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, modules):
    """The modules of the package that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def graph():
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {
        name: {other for other in imports(path, modules) if other in modules} - {"jax_gluon"}
        for name, path in modules.items()
    }


def test_no_module_imports_itself_in_a_circle():
    found = graph()
    assert found["jax_gluon._attention"] >= {"jax_gluon._lowering", "jax_gluon._plan.choice"}
    tuple(graphlib.TopologicalSorter(found).static_order())  # raises CycleError


def test_no_room_reaches_back_to_one_that_reaches_it():
    """Of the package's folders and the modules beside them."""

    def room(module):
        return ".".join(module.split(".")[:2])

    rooms = {}
    for module, others in graph().items():
        rooms.setdefault(room(module), set()).update(map(room, others))
    tuple(graphlib.TopologicalSorter({x: y - {x} for x, y in rooms.items()}).static_order())


def test_what_is_not_api_is_private():
    modules = [path.stem for path in PACKAGE.glob("*.py")]
    modules += [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert {name for name in modules if not name.startswith("_")} == PUBLIC


@pytest.mark.parametrize("folder", ["jax_gluon", "plugin", "shaders"])
def test_files_are_of_one_sitting(folder):
    kinds = {".py", ".h", ".cc", ".mm", ".metal"}
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    lengths = {str(path): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
