"""What our headers declare of Foundation and Metal, and what the host code uses of it.

Clang reads the host code with the very commands that built it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from clang import cindex

from tools.macos.target import LLVM

_KIND = cindex.CursorKind
_METHODS = {_KIND.OBJC_INSTANCE_METHOD_DECL: "-", _KIND.OBJC_CLASS_METHOD_DECL: "+"}
_OWNERS = {_KIND.OBJC_INTERFACE_DECL, _KIND.OBJC_PROTOCOL_DECL, _KIND.OBJC_CATEGORY_DECL}


@cache
def _index() -> cindex.Index:
    folder = Path(f"/usr/lib/llvm-{LLVM}/lib")
    cindex.Config.set_library_file(str(folder / f"libclang-{LLVM}.so.1"))
    return cindex.Index.create()


def parse(source: Path, arguments: list[str]) -> cindex.TranslationUnit:
    """The syntax tree of `source`; a text that does not compile is a ValueError."""
    # The library looks for the compiler's own headers beside the program that loads it.
    resources = f"/usr/lib/llvm-{LLVM}/lib/clang/{LLVM}"
    unit = _index().parse(str(source), args=[*arguments, "-resource-dir", resources])
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= cindex.Diagnostic.Error:
            raise ValueError(f"{diagnostic.location.file}: {diagnostic.spelling}")
    return unit


@dataclass(frozen=True, order=True)
class Method:
    """A method of a class or protocol: `sign` is "+" or "-"."""

    owner: str
    sign: str
    selector: str
    encoding: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.sign}[{self.owner} {self.selector}]"


@dataclass
class Interface:
    """Declarations by name, and the names of those that are used."""

    methods: set[Method] = field(default_factory=set)
    enumerators: dict[str, int] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    sent: set[Method] = field(default_factory=set)
    used_enumerators: set[str] = field(default_factory=set)

    def add(self, unit: cindex.TranslationUnit) -> None:
        for cursor in unit.cursor.get_children():
            path = str(cursor.location.file)
            if ".framework/Headers/" in path:
                self._declare(cursor)
            elif path == unit.spelling or "/plugin/metal/" in path:
                self._use(cursor)

    def _declare(self, cursor: cindex.Cursor) -> None:
        if cursor.kind in _OWNERS:
            self.methods |= set(_methods(cursor))
        elif cursor.kind == _KIND.ENUM_DECL:
            for each in cursor.get_children():
                if each.kind == _KIND.ENUM_CONSTANT_DECL:
                    self.enumerators[each.spelling] = each.enum_value
        elif cursor.kind == _KIND.FUNCTION_DECL and not cursor.is_definition():
            self.functions[cursor.spelling] = cursor.objc_type_encoding
        elif cursor.kind in (_KIND.LINKAGE_SPEC, _KIND.UNEXPOSED_DECL):
            for each in cursor.get_children():
                self._declare(each)

    def _use(self, cursor: cindex.Cursor) -> None:
        for each in cursor.walk_preorder():
            found = each.referenced
            if found is None:
                continue
            if found.kind == _KIND.ENUM_CONSTANT_DECL:
                self.used_enumerators.add(found.spelling)
            elif found.kind in _METHODS and each.kind == _KIND.OBJC_MESSAGE_EXPR:
                self.sent.add(_method(found))
            elif found.kind == _KIND.OBJC_PROPERTY_DECL:
                self.sent |= set(_accessors(found))


def _owner(cursor: cindex.Cursor) -> str:
    if cursor.kind == _KIND.OBJC_CATEGORY_DECL:
        return next(c.spelling for c in cursor.get_children() if c.kind == _KIND.OBJC_CLASS_REF)
    return cursor.spelling


def _method(cursor: cindex.Cursor) -> Method:
    owner = _owner(cursor.semantic_parent)
    return Method(owner, _METHODS[cursor.kind], cursor.spelling, cursor.objc_type_encoding)


def _methods(owner: cindex.Cursor) -> Iterator[Method]:
    """Methods of a class or protocol; those of its properties are among them."""
    return (_method(each) for each in owner.get_children() if each.kind in _METHODS)


def _accessors(declared: cindex.Cursor) -> Iterator[Method]:
    """Methods that stand where the property does: clang gives them its place."""
    for method in declared.semantic_parent.get_children():
        if method.kind in _METHODS and method.location == declared.location:
            yield _method(method)


def read(build: Path) -> Interface:
    """Of the host code that CMake built in `build`."""
    interface = Interface()
    for entry in json.loads((build / "compile_commands.json").read_text()):
        if entry["file"].endswith(".mm"):
            arguments = shlex.split(entry["command"])[1:]
            del arguments[arguments.index("-o") :]
            interface.add(parse(Path(entry["file"]), arguments))
    return interface
