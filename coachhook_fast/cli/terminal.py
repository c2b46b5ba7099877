"""The console of the command line: nothing that it prints is obeyed by the terminal but its own colours."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from coachhook_fast.printable import printable

_LAYOUT = "\n\t"


class SafeConsole(Console):
    """A console without markup whose every piece of text is `printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings in tables too: escaped before their width is measured, and never read as markup."""
        return super().render_str(printable(text, keep=_LAYOUT), **{**options, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever way a text took, here it passes."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text, keep=_LAYOUT), segment.style)


def cell(value: object, style: str = "") -> Text:
    """A text from elsewhere as one cell of a table: its line breaks are shown, too."""
    return Text(printable(value), style=style)


def console(pipe_width: int) -> Console:
    """Where tables go: stdout, `pipe_width` wide where it is no terminal."""
    return SafeConsole(file=sys.stdout, width=None if sys.stdout.isatty() else pipe_width)
