"""What commands print: tables of rich where it is installed, else of plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

Style = Literal["good", "bad", "doubtful", "quiet", ""]

_COLORS: dict[Style, str] = {
    "good": "green", "bad": "bold red", "doubtful": "yellow", "quiet": "dim", "": ""
}  # fmt: skip


class Console:
    """Prints sections of tables and lines: by rich on a terminal, else as plain text.

    Colors say nothing that words do not. Where NO_COLOR is set there are none, nor on a terminal
    without them.
    """

    def __init__(self, plain: bool = False) -> None:
        self._rich: Any = None if plain else _rich_console()

    def line(self, text: str = "", style: Style = "") -> None:
        """A line of text."""
        if self._rich is None:
            _print(text)
        else:
            self._rich.print(text, style=_COLORS[style], markup=False, highlight=False)

    def table(
        self,
        title: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        styles: Sequence[Style] = (),
    ) -> None:
        """A table under its title; `styles` are those of the rows."""
        if self._rich is None:
            self._plain_table(title, headers, rows)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
            show_header=any(headers), pad_edge=False,
        )  # fmt: skip
        for header in headers:
            table.add_column(header, overflow="fold")
        for i, row in enumerate(rows):
            style = _COLORS[styles[i]] if i < len(styles) else ""
            table.add_row(*(Text(cell) for cell in row), style=style)
        self._rich.print(table)

    def _plain_table(
        self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        _print(title)
        lines = [headers, *rows] if any(headers) else list(rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            _print("  " + "  ".join(cells).rstrip())
        _print("")


def _rich_console() -> Any:
    # A terminal may use another encoding than rich's tables do.
    if sys.stdout is None or not sys.stdout.isatty() or not _can_encode("\u2500"):
        return None
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return RichConsole()


def _can_encode(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(text: str) -> None:
    if sys.stdout is None:  # closed before the command began
        return
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding))


def complain(command: str, text: str) -> int:
    """One line on standard error, for what can't be done; returns the exit status."""
    print(f"jax-gluon {command}: {text}", file=sys.stderr)
    return 1
