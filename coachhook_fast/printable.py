"""Text of edit sets, facts and models made fit for a person's eyes: what a terminal or a browser would obey, or hide,
is shown as an escape instead.
"""

from __future__ import annotations

import re

# C0, DEL and C1 controls; lone surrogates; line and paragraph separators; what sets a direction, has no width, or
# carries a hidden text (tags). Joiners stay: Persian, Indic scripts and emoji are written with them.
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def printable(text: object, *, keep: str = "") -> str:
    """`text` with every character that is no visible one as \\xNN, \\uNNNN or \\UNNNNNNNN, those in `keep` as they
    are."""
    return _UNFIT.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def one_line(text: object, *, most: int = 2_000) -> str:
    """For an error or a warning: all of it in one line, of at most `most` characters and an ellipsis."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= most else f"{line[:most]}…"


def _escape(character: str) -> str:
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
    code = ord(character)
    return named or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
