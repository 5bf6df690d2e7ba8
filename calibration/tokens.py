"""Long texts to tokens: piece by piece, and into a file.

A tokenizer of transformers needs some 200 bytes of memory and a microsecond and a half for each byte of text that it is
given at once. Pieces overlap, and are joined inside of the overlap where both have the same tokens at the same places
of the text: the tokens are those of the whole text.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moepress.errors import MoepressError

PIECE_CHARS = 1 << 17
OVERLAP_CHARS = 1 << 12
SEAM_TOKENS = 8
"""So many tokens on either side of a seam are the same in both pieces."""

Ids = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer (`AutoTokenizer.from_pretrained`)."""

    is_fast: bool
    bos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenize one text."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """The text of some tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some tokens of a text, in order.

    Attributes:
        ids: of the tokens.
        ends: the UTF-8 byte of the text where each token ends; special tokens end where the last one did. Without
            offsets (a slow tokenizer) all 0.
        last: whether the text ends here.
    """

    ids: Ids
    ends: Bytes
    last: bool


def pieces(tokenizer: Tokenizer, text: str, *, special: bool = True, piece_chars: int = PIECE_CHARS) -> Iterator[Piece]:
    """The tokens of one text, as the tokenizer gives them for all of it.

    Args:
        tokenizer: one without offsets is given the text as a whole.
        text: of any length.
        special: also what the tokenizer puts before and behind a text.
        piece_chars: text that is tokenized at once.
    """
    if not tokenizer.is_fast or len(text) <= 2 * piece_chars:
        part = _encode(tokenizer, text, 0, len(text), special=special)
        yield Piece(ids=part.ids, ends=_end_bytes(text, part.ends) if tokenizer.is_fast else part.ends, last=True)
        return
    before, behind = _special_ids(tokenizer) if special else ([], [])
    base, ended, first = 0, 0, True
    for place, part, begin, end in _joined(tokenizer, text, piece_chars):
        base += len(text[place : part.start].encode())
        ends = base + _end_bytes(text[part.start : part.stop], part.ends - part.start)[begin:end]
        last = part.stop == len(text) and end == len(part.ids)
        ids = [*(before if first else ()), *part.ids[begin:end], *(behind if last else ())]
        padded = [
            *([0] * len(before) if first else ()),
            *ends,
            *([ends[-1] if len(ends) else ended] * len(behind) if last else ()),
        ]
        ended, first = int(padded[-1]) if padded else ended, False
        yield Piece(ids=np.array(ids, dtype=np.int32), ends=np.array(padded, dtype=np.int64), last=last)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Tokens of text[start:stop], and the characters of the text where each begins and ends."""

    start: int
    stop: int
    ids: Ids
    begins: Bytes
    ends: Bytes

    def keys(self) -> Bytes:
        """What tells tokens apart, [tokens, 3]."""
        return np.stack([self.ids.astype(np.int64), self.begins, self.ends], axis=1)


def _encode(tokenizer: Tokenizer, text: str, start: int, stop: int, *, special: bool = False) -> _Part:
    """`verbose=False`: a text that is longer than the model's context is no mistake here."""
    options: dict[str, Any] = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    found = tokenizer(text[start:stop], add_special_tokens=special, verbose=False, **options)
    ids = np.array(found["input_ids"], dtype=np.int32)
    offsets = np.array(found["offset_mapping"] if tokenizer.is_fast else np.zeros((len(ids), 2)), dtype=np.int64)
    offsets = offsets.reshape(-1, 2) + start
    return _Part(start=start, stop=stop, ids=ids, begins=offsets[:, 0], ends=offsets[:, 1])


def _joined(tokenizer: Tokenizer, text: str, size: int) -> Iterator[tuple[int, _Part, int, int]]:
    """Parts of a text with the range of their tokens that counts, each with the start of the part before it."""
    place, begin = 0, 0
    part = _encode(tokenizer, text, 0, size)
    while part.stop < len(text):
        start = max(part.stop - OVERLAP_CHARS, part.start)
        following = _encode(tokenizer, text, start, min(start + max(size, 2 * OVERLAP_CHARS), len(text)))
        seam = _seam(part, following, begin)
        if seam is None:  # such as one word of a million letters: no place is safe, take more at once
            part = _encode(tokenizer, text, part.start, min(part.stop + part.stop - part.start, len(text)))
            continue
        yield place, part, begin, seam[0]
        place, part, begin = part.start, following, seam[1]
    yield place, part, begin, len(part.ids)


def _seam(left: _Part, right: _Part, begin: int) -> tuple[int, int] | None:
    """Where one part can give way to the next, as places among their tokens; near the middle of the overlap."""
    ours, theirs = left.keys(), right.keys()
    shared = np.flatnonzero(right.ends <= left.stop)
    where = dict(zip(map(tuple, theirs[shared].tolist()), shared.tolist(), strict=True))
    first = max(int(np.searchsorted(left.begins, right.start)), begin, SEAM_TOKENS)
    candidates = range(first, len(ours) - SEAM_TOKENS + 1)
    middle = (first + len(ours)) // 2
    for i in sorted(candidates, key=lambda place: abs(place - middle)):
        j = where.get(tuple(ours[i].tolist()))
        if j is None or j < SEAM_TOKENS or j + SEAM_TOKENS > len(theirs):
            continue
        span = slice(i - SEAM_TOKENS, i + SEAM_TOKENS)
        if np.array_equal(ours[span], theirs[j - SEAM_TOKENS : j + SEAM_TOKENS]):
            return i, j
    return None


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for place in range(len(full) - len(plain) + 1):
        if full[place : place + len(plain)] == plain:
            return full[:place], full[place + len(plain) :]
    return [], []


def _end_bytes(text: str, ends: Bytes) -> Bytes:
    """int64 [tokens]: the UTF-8 byte of the text where each token ends, from characters; never less than before."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    byte_at = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])
    found: Bytes = byte_at[np.maximum.accumulate(ends)] if len(ends) else np.zeros(0, dtype=np.int64)
    return found


class TokenFile:
    """Tokens one after another in a temporary file, which goes with this object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object lives
        self._mapped: Ids = np.zeros(0, dtype=np.int32)
        self.count = 0

    def append(self, ids: Ids) -> None:
        """Put tokens behind the others.

        Raises:
            MoepressError: the disk has no room for them.
        """
        try:
            self._file.write(ids.astype("<i4", copy=False).tobytes())
        except OSError as error:
            raise MoepressError(
                f"{tempfile.gettempdir()} has no room for the tokens of the text ({error.strerror}); make room there, "
                "set TMPDIR to a folder of a larger disk, or ask for fewer tokens."
            ) from error
        self.count += len(ids)

    def array(self) -> Ids:
        """All tokens, mapped from the file."""
        if self.count != len(self._mapped):
            self._file.flush()
            self._mapped = np.memmap(self._file, dtype="<i4", mode="r", shape=(self.count,))
        return self._mapped
