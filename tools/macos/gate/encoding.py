"""Objective-C type encodings, as `@24@0:8Q16`: a result and arguments, each with its offset."""

from __future__ import annotations

import re

_QUALIFIERS = "rnNoORVA"
_CLOSING = {"{": "}", "(": ")", "[": "]"}


def _end(text: str, i: int) -> int:
    """Where the type that begins at `i` ends."""
    while text[i] in _QUALIFIERS:
        i += 1
    if text[i] == "^":
        return _end(text, i + 1)
    if text[i] in _CLOSING:
        depth = 0
        for j in range(i, len(text)):
            depth += (text[j] in "{([") - (text[j] in "})]")
            if depth == 0:
                return j + 1
        raise ValueError(f"{text!r} does not close what it opens at {i}")
    if text[i] == "@" and text[i + 1 : i + 2] == "?":
        return i + 2
    return i + 1


def types(encoding: str) -> tuple[str, ...]:
    """Types of the result, of self and _cmd, and of the arguments, without names of classes."""
    text = re.sub(r'"[^"]*"', "", encoding)
    found: list[str] = []
    i = 0
    while i < len(text):
        end = _end(text, i)
        found.append(text[i:end])
        i = end
        while i < len(text) and text[i].isdigit():
            i += 1
    return tuple(found)


def plain(kind: str) -> str:
    """A type without qualifiers and names of structures."""
    kind = kind.lstrip(_QUALIFIERS)
    kind = re.sub(rf"\^[{_QUALIFIERS}]+", "^", kind)
    return re.sub(r"\{[^=}]*=", "{", kind)


def plain_types(encoding: str) -> tuple[str, ...]:
    """`types` as languages without qualifiers can give them, without self and _cmd."""
    result, _, _, *arguments = types(encoding)
    return tuple(plain(kind) for kind in (result, *arguments))
