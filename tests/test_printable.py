"""Text of strangers as a person sees it."""

from __future__ import annotations

import pytest

from coachhook_fast.printable import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://evil\x1b\\here\x1b]8;;\x07", r"\x1b]8;;http://evil\x1b\here\x1b]8;;\x07"),
        ("\x9b31m \x85", r"\x9b31m \x85"),
        ("a\0b\x7f", r"a\x00b\x7f"),
        ("ab\u202ecd\u2066e\u200f", r"ab\u202ecd\u2066e\u200f"),
        ("\ud800x\udfff", r"\ud800x\udfff"),
        ("\u2028\ufeff\u200b", r"\u2028\ufeff\u200b"),
        ("\U000e0041", r"\U000e0041"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
    ],
)
def test_what_is_obeyed_or_hidden_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize(
    "text", ["Zoë Müller", "東京", "می‌خواهم", "👩‍🚀", "क्‍ष", "‖Δk‖ → ∞", "C:\\new", "", "[red]x[/red]"]
)
def test_other_text_stays(text: str) -> None:
    assert printable(text) == text


def test_what_is_kept() -> None:
    assert printable("a\n\x1b\t", keep="\n\t") == "a\n\\x1b\t"


def test_one_line() -> None:
    assert one_line("a\n  b\x1b\u2028c") == "a b\\x1b c"
    assert one_line("x" * 3000) == "x" * 2000 + "…"
