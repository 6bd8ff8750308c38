"""What Apple's metal-cpp says of Foundation and Metal: C++ methods that send messages.

Each names its selector, and its C++ types give the message's types, without qualifiers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clang import cindex

from tools.macos.gate.interface import parse
from tools.macos.target import TRIPLE

_KIND = cindex.CursorKind
_TYPE = cindex.TypeKind
_LETTERS = {
    _TYPE.VOID: "v",
    _TYPE.BOOL: "B",
    _TYPE.CHAR_S: "c",
    _TYPE.SCHAR: "c",
    _TYPE.UCHAR: "C",
    _TYPE.SHORT: "s",
    _TYPE.USHORT: "S",
    _TYPE.INT: "i",
    _TYPE.UINT: "I",
    _TYPE.LONG: "q",
    _TYPE.ULONG: "Q",
    _TYPE.LONGLONG: "q",
    _TYPE.ULONGLONG: "Q",
    _TYPE.FLOAT: "f",
    _TYPE.DOUBLE: "d",
    _TYPE.BLOCKPOINTER: "@?",
}
# Objective-C's own pointers, and the classes of libdispatch.
_POINTERS = {"objc_selector": ":", "objc_class": "#", "objc_object": "@"}
_POINTERS |= {"dispatch_data_s": "@", "dispatch_queue_s": "@"}
_SELECTOR = re.compile(r'_(?:MTL|NS)_PRIVATE_DEF_SEL\(\s*(\w+),\s*"([^"]+)"\s*\)')


class UnknownTypeError(ValueError):
    """A C++ type that no message has, such as a reference."""


def _encode(cxx: cindex.Type) -> str:
    """The plain encoding (encoding.py) of a C++ type."""
    kind = cxx.get_canonical()
    if kind.kind in _LETTERS:
        return _LETTERS[kind.kind]
    if kind.kind == _TYPE.ENUM:
        return _encode(kind.get_declaration().enum_type)
    if kind.kind == _TYPE.RECORD:
        return "{" + "".join(_encode(each.type) for each in kind.get_fields()) + "}"
    if kind.kind == _TYPE.POINTER:
        pointee = kind.get_pointee()
        declaration = pointee.get_declaration()
        if pointee.kind in (_TYPE.CHAR_S, _TYPE.SCHAR):
            return "*"
        if declaration.spelling in _POINTERS:
            return _POINTERS[declaration.spelling]
        # Structures stand for values, classes for Objective-C's.
        if declaration.kind == _KIND.CLASS_DECL:
            return "@"
        return "^" + _encode(pointee)
    raise UnknownTypeError(kind.spelling)


@dataclass
class MetalCpp:
    """Plain encodings by (class or protocol, selector), of each overload; values of enumerators."""

    methods: dict[tuple[str, str], set[tuple[str, ...]]] = field(default_factory=dict)
    enumerators: dict[str, int] = field(default_factory=dict)

    def add(self, unit: cindex.TranslationUnit, selectors: dict[str, str]) -> None:
        for space in unit.cursor.get_children():
            if space.kind == _KIND.NAMESPACE and space.spelling in ("NS", "MTL"):
                for cursor in space.get_children():
                    if cursor.kind == _KIND.ENUM_DECL:
                        for each in cursor.get_children():
                            name = space.spelling + each.spelling
                            self.enumerators[name] = each.enum_value
            elif space.kind == _KIND.CXX_METHOD and space.is_definition():
                self._add_method(space, selectors)

    def _add_method(self, method: cindex.Cursor, selectors: dict[str, str]) -> None:
        owner = method.semantic_parent
        name = owner.semantic_parent.spelling + owner.spelling
        try:
            encoding = tuple(map(_encode, (method.result_type, *method.type.argument_types())))
        except UnknownTypeError:
            return
        for selector in _selectors(method):
            # A convenience that passes fewer or more arguments than it takes says nothing.
            if selectors[selector].count(":") == len(encoding) - 1:
                self.methods.setdefault((name, selectors[selector]), set()).add(encoding)


def _selectors(method: cindex.Cursor) -> Iterator[str]:
    """Names of the variables of selectors that `method` uses."""
    for each in method.walk_preorder():
        if each.kind == _KIND.DECL_REF_EXPR and each.spelling.startswith("s_k"):
            found = each.referenced
            if found is not None and found.semantic_parent.spelling == "Selector":
                yield each.spelling.removeprefix("s_k")


def load(folder: Path, sdk: Path, stubs: Path) -> MetalCpp:
    """Of metal-cpp in `folder`. `stubs` has headers of the frameworks that the SDK leaves out."""
    selectors: dict[str, str] = {}
    for header in folder.rglob("*.hpp"):
        selectors |= dict(_SELECTOR.findall(header.read_text()))
    arguments = [f"--target={TRIPLE}", "-isysroot", str(sdk), "-x", "c++", "-std=c++17"]
    arguments += ["-idirafter", str(stubs)]
    known = MetalCpp()
    known.add(parse(folder / "Metal/Metal.hpp", arguments), selectors)
    return known
