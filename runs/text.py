"""Text that comes from outside, made safe to print: names in files may hold anything."""

import difflib
import unicodedata
from collections.abc import Iterable

LONGEST = 4000
"""Characters of a message that are printed; what is beyond lies in its middle and is left out."""
_UNSAFE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, separators of lines and paragraphs
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c")
"""What turns the direction of the text behind it."""


def printable(text: str, *, lines: bool = False) -> str:
    """The text with what a terminal or a log might obey, and what no encoding takes, as escapes.

    Args:
        text: any.
        lines: it may have several lines, and tabs.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _harmless(c, lines=lines) else c.encode("unicode_escape").decode("ascii") for c in text)


def _harmless(character: str, *, lines: bool) -> bool:
    if character in "\n\t":
        return lines
    return unicodedata.category(character) not in _UNSAFE and character not in _TURNING


def message(text: str) -> str:
    """A message as it is printed: safe, and of bounded length; its beginning and its end stay."""
    safe = printable(text, lines=True)
    if len(safe) <= LONGEST:
        return safe
    left = len(safe) - LONGEST
    return f"{safe[: LONGEST * 3 // 4]} ... ({left:,} characters are left out) ... {safe[-LONGEST // 4 :]}"


def one_line(error: BaseException, longest: int = 300) -> str:
    """What another library's error says, in one line of bounded length, for a sentence of ours."""
    try:
        text = " ".join(str(error).split()).rstrip(".:;")
    except Exception:  # an error that cannot even say what it is
        text = ""
    text = text or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def cut(value: object, longest: int = 80) -> str:
    """A value from a file for a message: as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def suggestion(name: str, names: Iterable[str]) -> str:
    """` (did you mean NAME?)` where one of the names is near, else nothing."""
    known = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return f" (did you mean {known[near[0]]}?)" if near else ""
