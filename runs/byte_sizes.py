"""Sizes in bytes, as people write and read them."""

import re

from moepress.errors import UsageError

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str | None, option: str = "--max-memory") -> int | None:
    """A size such as 8GiB, 500MB or 12G, in bytes; the option is named where it is not.

    Raises:
        UsageError: it is not a size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2].lower(), 0)) if found else 0
    if size < 1:
        raise UsageError(f"{option} {text!r} is not a size; write for example 8GiB.")
    return size


def size_text(size: int) -> str:
    """Bytes as MiB or GiB, for a sentence."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def parse_share(text: str) -> float:
    """A share as people write it: 0.75, or 75% (of 1).

    Raises:
        ValueError: it is none.
    """
    plain = text.strip()
    return float(plain.removesuffix("%").strip()) / 100 if plain.endswith("%") else float(plain)


def mib_text(size: int) -> str:
    """Bytes as MiB, for comparing two sizes in one sentence; one decimal below 100."""
    mib = size / 2**20
    return f"{mib:.1f} MiB" if mib < 100 else f"{mib:,.0f} MiB"
