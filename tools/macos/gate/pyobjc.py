"""What PyObjC's wheels say of Foundation and Metal.

Its compiled modules hold the protocols that they use, with the type encodings that Apple's compiler
made of Apple's headers. Its metadata names methods, functions and constants, in part with types.
"""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lief

# Where a protocol's record points to its lists of methods.
_METHOD_LISTS = {24: "-", 32: "+", 40: "-", 48: "+"}
_IS_RELATIVE = 0x80000000
# Pointers in chained fixups carry the target in their low 36 bits, from the image's beginning.
_TARGET = (1 << 36) - 1


class _Image:
    """Objective-C records of a module for arm64."""

    def __init__(self, path: Path) -> None:
        parsed = lief.MachO.parse(str(path))
        if parsed is None:
            raise ValueError(f"{path} is no Mach-O file")
        self.fat = parsed  # owns the binary
        arm64 = lief.MachO.Header.CPU_TYPE.ARM64
        self.binary = next(each for each in self.fat if each.header.cpu_type == arm64)
        self.base = self.binary.imagebase

    def read(self, layout: str, address: int) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        return struct.unpack(layout, self._bytes(address, size))

    def pointer(self, address: int) -> int:
        target = self.read("<Q", address)[0] & _TARGET
        return target if target == 0 or target >= self.base else self.base + target

    def text(self, address: int) -> str:
        found = b""
        while b"\0" not in found:
            found += self._bytes(address + len(found), 1)
        return found[:-1].decode()

    def _bytes(self, address: int, size: int) -> bytes:
        return bytes(self.binary.get_content_from_virtual_address(address, size))

    def protocols(self) -> Iterator[tuple[str, str, str, str]]:
        """Protocol, "+" or "-", selector and encoding of each method."""
        section = self.binary.get_section("__objc_protolist")
        if section is None:
            return
        for offset in range(0, section.size, 8):
            protocol = self.pointer(section.virtual_address + offset)
            name = self.text(self.pointer(protocol + 8))
            for place, sign in _METHOD_LISTS.items():
                if methods := self.pointer(protocol + place):
                    for selector, encoding in self._methods(methods):
                        yield name, sign, selector, encoding

    def _methods(self, address: int) -> Iterator[tuple[str, str]]:
        flags, count = self.read("<II", address)
        for i in range(count):
            if flags & _IS_RELATIVE:
                entry = address + 8 + 12 * i
                name, encoding, _ = self.read("<iii", entry)
                yield self.text(self.pointer(entry + name)), self.text(entry + 4 + encoding)
            else:
                entry = address + 8 + 24 * i
                yield self.text(self.pointer(entry)), self.text(self.pointer(entry + 8))


def _text(kind: bytes | str) -> str:
    return kind.decode() if isinstance(kind, bytes) else kind


@dataclass
class PyObjC:
    """Encodings by (protocol, sign, selector); the rest by name."""

    encodings: dict[tuple[str, str, str], str] = field(default_factory=dict)
    # By (class, selector): types by index, -1 for the result's; self and _cmd are 0 and 1.
    methods: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    enumerators: dict[str, int] = field(default_factory=dict)

    def add_metadata(self, text: str) -> None:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "r":
                self._add_method(node)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "functions":
                self._add_functions(node.value)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name, value in re.findall(r"\$(\w+)@(-?\d+)(?=\$)", node.value):
                    self.enumerators[name] = int(value)

    def _add_method(self, call: ast.Call) -> None:
        try:
            owner, selector, about = (ast.literal_eval(each) for each in call.args)
        except ValueError:
            return  # not literal: differs by architecture
        entries = {-1: about.get("retval", {}), **about.get("arguments", {})}
        kinds = {i: _text(each["type"]) for i, each in entries.items() if "type" in each}
        self.methods[owner.decode(), selector.decode()] = kinds

    def _add_functions(self, table: ast.expr) -> None:
        assert isinstance(table, ast.Dict)
        for name, about in zip(table.keys, table.values, strict=True):
            if isinstance(name, ast.Constant) and isinstance(about, ast.Tuple):
                try:
                    self.functions[str(name.value)] = _text(ast.literal_eval(about.elts[0]))
                except ValueError:
                    continue  # as above


def load(folders: list[Path]) -> PyObjC:
    """From the folders of PyObjC's unpacked wheels."""
    known = PyObjC()
    for folder in folders:
        for module in sorted(folder.rglob("_*.so")):
            for *method, encoding in _Image(module).protocols():
                known.encodings[tuple(method)] = encoding
        for metadata in sorted(folder.rglob("_metadata.py")):
            known.add_metadata(metadata.read_text())
    return known
