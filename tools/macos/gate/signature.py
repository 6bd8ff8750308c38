"""The ad-hoc signature that arm64 asks for: the kernel compares each page with its hash."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import lief

from tools.macos.gate.result import Result

_SUPER_BLOB, _CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
_AD_HOC = 0x2
_SHA256 = 2


def _code_directory(signature: bytes) -> bytes | None:
    magic, _, count = struct.unpack_from(">III", signature)
    if magic != _SUPER_BLOB:
        return None
    for i in range(count):
        _, offset = struct.unpack_from(">II", signature, 12 + 8 * i)
        magic, size = struct.unpack_from(">II", signature, offset)
        if magic == _CODE_DIRECTORY:
            return signature[offset : offset + size]
    return None


def check(path: Path) -> Result:
    data = path.read_bytes()
    binary = lief.MachO.parse(str(path))
    command = binary.at(0).code_signature if binary else None
    if command is None:
        return Result("signature", "none", ("the plugin is not signed",))
    begin = command.data_offset
    directory = _code_directory(data[begin : begin + command.data_size])
    if directory is None:
        return Result("signature", "none", ("the signature has no code directory",))
    (_, _, _, flags, hashes, _, _, pages, limit, size, kind, _, shift) = struct.unpack_from(
        ">IIIIIIIIIBBBB", directory
    )
    problems = []
    if not flags & _AD_HOC:
        problems.append(f"flags are {flags:#x}, not those of an ad-hoc signature")
    if (kind, size) != (_SHA256, hashlib.sha256().digest_size):
        problems.append(f"hashes are of kind {kind} and {size} bytes, not SHA-256")
    if limit != begin or pages != -(-begin // (1 << shift)):
        problems.append(f"{pages} pages up to {limit:#x} are signed, expected all up to {begin:#x}")
    for page in range(pages):
        content = data[page << shift : min((page + 1) << shift, limit)]
        if hashlib.sha256(content).digest() != directory[hashes + page * size :][:size]:
            problems.append(f"page {page} (at {page << shift:#x}) is not what was signed")
    return Result("signature", f"ad hoc, {pages} pages of {1 << shift} bytes", tuple(problems))
