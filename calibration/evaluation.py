"""What is read of one domain for evaluation: its text from the beginning, as the GPTQ papers cut it.

All documents of a domain, empty ones too, are joined by a blank line and tokenized as one text. Where only so many
windows are wanted and a domain has several files with more text than that, each file gives its beginning, in proportion
to its size: the first file would stand for the whole domain otherwise.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moepress.calibration.documents import Document, cut_text, read_documents
from moepress.calibration.pools import ROOM_BYTES, dealt
from moepress.calibration.sources import Source, source_files
from moepress.calibration.templates import ChatTemplate
from moepress.calibration.tokens import Bytes, Ids, Piece, TokenFile, Tokenizer, pieces

CUT_MARGIN = 64  # tokens before a cut in the text that the cut may have changed
SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPart:
    """One domain of an evaluation corpus.

    Attributes:
        windows: int64 [N, T].
        window_bytes: int64 [N].
        tokens: that were read.
        documents: that were read.
        any_rendered: whether a chat template wrote any of them.
        notes: what was not read.
    """

    windows: torch.Tensor
    window_bytes: torch.Tensor
    tokens: int
    documents: int
    any_rendered: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Tokens, the byte where each ends, and whether there is more text than they cover."""

    ids: Ids
    ends: Bytes
    documents: int
    any_rendered: bool
    more: bool


Files = Sequence[tuple[Path, bool]]


def evaluation_part(
    domain: str,
    group: Sequence[Source],
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    *,
    window: int,
    max_windows: int | None,
) -> EvaluationPart:
    """The windows of one domain, and their bytes; none where it has too little text.

    Args:
        domain: its name.
        group: its sources, in their order.
        tokenizer: gives the tokens.
        chat: writes conversations.
        window: tokens of a window.
        max_windows: as many at most.
    """
    files = [(path, source.embedded) for source in group for path in source_files(source)]
    wanted = None if max_windows is None else max_windows * window
    read = _joined(files, tokenizer, chat, wanted)
    more, embedded = read.more or len(read.ids) >= (max_windows or len(read.ids)) * window + window, files[0][1]
    shares = max_windows is not None and more and len(files) > 1 and not embedded
    if shares and max_windows is not None:
        read = _in_proportion(files, tokenizer, chat, max_windows, window)
    count = min(len(read.ids) // window, max_windows or len(read.ids))
    windows = torch.from_numpy(read.ids[: count * window].astype(np.int64)).view(count, window)
    what = f"the beginning of each of its {len(files)} files" if shares else "the beginning of its text"
    note = f"domain {domain}: {count} windows were measured, {what}; the rest was not read"
    return EvaluationPart(
        windows=windows,
        window_bytes=_window_bytes(windows, read.ends if tokenizer.is_fast else None, tokenizer),
        tokens=len(read.ids),
        documents=read.documents,
        any_rendered=read.any_rendered,
        notes=(note,) if more and not embedded else (),
    )


def _joined(files: Files, tokenizer: Tokenizer, chat: ChatTemplate, wanted: int | None) -> _Read:
    """Files as one text, of which at least so many tokens are read where they have them."""
    limit_bytes = None if wanted is None else ROOM_BYTES * (2 * wanted + CUT_MARGIN)
    while True:
        documents, cut = _documents(files, chat, limit_bytes)
        text = SEPARATOR.join(document.text for document in documents)
        any_rendered = any(document.rendered for document in documents)
        enough = None if wanted is None else wanted + CUT_MARGIN
        ids, ends, rest = _tokens(pieces(tokenizer, text, special=not any_rendered), enough)
        if enough is None or limit_bytes is None or not cut or len(ids) >= enough:
            break
        limit_bytes *= 4  # tokens here cover more text than usual
    return _Read(ids=ids, ends=ends, documents=len(documents), any_rendered=any_rendered, more=cut or rest)


def _tokens(found: Iterable[Piece], enough: int | None) -> tuple[Ids, Bytes, bool]:
    """Tokens until there are enough, the byte where each ends, and whether there are more."""
    ids, ends, more = TokenFile(), list[Bytes](), False
    for piece in found:
        ids.append(piece.ids)
        ends.append(piece.ends)
        more = not piece.last
        if enough is not None and ids.count >= enough:
            break
    return ids.array(), np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64), more


def _documents(files: Files, chat: ChatTemplate, limit_bytes: int | None) -> tuple[list[Document], bool]:
    """The documents of some files, and whether the limit left some text unread."""
    documents: list[Document] = []
    room = limit_bytes
    for document in _each(files, chat, limit_bytes):
        text, cut = cut_text(document.text, room)
        documents.append(Document(text=text, rendered=document.rendered, cut=cut or document.cut))
        if room is not None:
            room -= len(text.encode()) + len(SEPARATOR)
            if cut or document.cut or room < CUT_MARGIN:  # not 0: a limit inside a character gives a few bytes less
                return documents, True
    return documents, False


def _each(files: Files, chat: ChatTemplate, limit_bytes: int | None) -> Iterator[Document]:
    for path, embedded in files:
        yield from read_documents(path, chat, embedded=embedded, limit_bytes=limit_bytes)


def _in_proportion(files: Files, tokenizer: Tokenizer, chat: ChatTemplate, max_windows: int, window: int) -> _Read:
    """The beginning of each file; of more files than windows, the first ones. What a file lacks the others give."""
    files = files[:max_windows]
    sizes = [path.stat().st_size for path, _ in files]
    wanted = [windows * window for windows in dealt(max_windows, sizes)]
    parts = [_joined([file], tokenizer, chat, count) for file, count in zip(files, wanted, strict=True)]
    given = [min(len(part.ids), count) for part, count in zip(parts, wanted, strict=True)]
    for place, (file, part) in enumerate(zip(files, parts, strict=True)):
        lacking = max_windows * window - sum(given)
        if lacking > 0 and (part.more or len(part.ids) > given[place]):
            parts[place] = _joined([file], tokenizer, chat, given[place] + lacking)
            given[place] = min(len(parts[place].ids), given[place] + lacking)
    base, ends = 0, list[Bytes]()
    for part, count in zip(parts, given, strict=True):
        ends.append(part.ends[:count] + base)
        base = int(ends[-1][-1]) if count else base
    return _Read(
        ids=np.concatenate([part.ids[:count] for part, count in zip(parts, given, strict=True)]),
        ends=np.concatenate(ends),
        documents=sum(part.documents for part in parts),
        any_rendered=any(part.any_rendered for part in parts),
        more=True,
    )


def _window_bytes(windows: torch.Tensor, ends: Bytes | None, tokenizer: Tokenizer) -> torch.Tensor:
    """int64 [N]: UTF-8 bytes from the end of each window's first token to the end of its last; windows int64 [N, T]."""
    count, window = windows.shape
    if ends is not None:
        cut = torch.from_numpy(ends[: count * window].copy()).view(count, window)
        return cut[:, -1] - cut[:, 0]
    texts = [(tokenizer.decode(row), tokenizer.decode(row[:1])) for row in windows.tolist()]
    return torch.tensor([len(whole.encode()) - len(first.encode()) for whole, first in texts], dtype=torch.int64)
