"""No function of plugin/ takes more arguments than a reader can keep apart."""

from pathlib import Path

import pytest

from tools.macos.gate import interface
from tools.macos.target import LLVM

ROOT = Path(__file__).resolve().parents[2]
MAX_ARGUMENTS = 7


def test_functions_of_the_cpu_kernels_take_few_arguments():
    """Beyond this they take an object, or there is one that should have been made."""
    cindex = pytest.importorskip("clang.cindex")
    if not Path(f"/usr/lib/llvm-{LLVM}/lib/libclang-{LLVM}.so.1").exists():
        pytest.skip(f"no libclang {LLVM}")
    kinds = {
        cindex.CursorKind.FUNCTION_DECL,
        cindex.CursorKind.FUNCTION_TEMPLATE,
        cindex.CursorKind.CXX_METHOD,
        cindex.CursorKind.CONSTRUCTOR,
    }
    unit = interface.parse(ROOT / "plugin/cpu/portable.cc", ["-std=c++17", f"-I{ROOT / 'plugin'}"])
    counts: dict[str, int] = {}

    def visit(cursor):
        for child in cursor.get_children():
            location = child.location.file
            if location is not None and ROOT / "plugin" not in Path(location.name).parents:
                continue
            if child.kind in kinds:
                parameters = [
                    x for x in child.get_children() if x.kind == cindex.CursorKind.PARM_DECL
                ]
                where = Path(location.name).relative_to(ROOT)
                counts[f"{where}:{child.location.line} {child.spelling}"] = len(parameters)
            visit(child)

    visit(unit.cursor)
    assert len(counts) > 300
    too_many = {name: count for name, count in counts.items() if count > MAX_ARGUMENTS}
    assert not too_many, "\n".join(f"{name}: {count}" for name, count in too_many.items())
