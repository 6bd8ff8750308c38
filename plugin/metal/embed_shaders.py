"""Writes each `shaders/*.metal`, with what it includes of that folder, into one C++ header.

Metal compiles a library from one text at run time, without folders of headers.

Usage: embed_shaders.py SHADERS HEADER
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

# Compilers need not take longer literals than 65,536 bytes.
PIECE = 16000
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def flat(path: Path, seen: set[Path]) -> str:
    """The text of `path`, each of its headers in place where it is first included."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda match: flat(path.parent / match[1], seen), text)


def literal(text: str) -> str:
    """C++ for `text`."""
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    return "\n".join(f'R"metal({piece})metal"' for piece in pieces)


def entry(path: Path) -> str:
    """C++ that returns the text of a shader for its name."""
    condition = f'std::strcmp(stem, "{path.stem}") == 0'
    return f"  if ({condition}) {{\n    return {literal(flat(path, set()))};\n  }}\n"


def main() -> None:
    """Writes the header."""
    folder, header = map(Path, sys.argv[1:])
    entries = "".join(entry(path) for path in sorted(folder.glob("*.metal")))
    digest = hashlib.sha256(entries.encode()).hexdigest()[:16]
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(
        "// Made by embed_shaders.py.\n#pragma once\n\n#include <cstring>\n\n"
        f'constexpr char kShaderSourcesDigest[] = "{digest}";\n\n'
        "// The Metal text of a shader; null where there is none of that name.\n"
        f"inline const char* shader_source(const char* stem) {{\n{entries}  return nullptr;\n}}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
