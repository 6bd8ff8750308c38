"""An extension of griffe, by which mkdocstrings reads docstrings: shows their examples as code.

Markdown takes a line that begins with `>>>` for a quotation three deep, and numbers in brackets for
links.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A prompt and all lines to the next that is empty, at whatever depth.
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.M)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(
                lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", obj.docstring.value
            )
