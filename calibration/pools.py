"""What is read of one domain for calibration: windows are drawn from a pool of its tokens, packed end to end.

Files are read in an order that the seed gives, until the pool is full. Where it is full before all files are read, each
file gives a part in proportion to its size instead, so that no file stands for the whole domain. (Of the embedded text
some whole modules are taken: they are samples of one kind.)
"""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np

from moepress.calibration.documents import Document, read_documents
from moepress.calibration.sources import Source, source_files
from moepress.calibration.templates import ChatTemplate
from moepress.calibration.tokens import Ids, Piece, TokenFile, Tokenizer, pieces
from moepress.errors import InvalidInputError

ROOM_BYTES = 4  # text read for each token wanted, about what a token covers
MOST_FILES = 256  # of one domain in part: each is an open file


Begin = Callable[[Path, int], Generator[tuple[Document, Piece]]]
"""Opens a file whose documents are cut to so many bytes; gives the tokens of those that have any text."""


class TextFile:
    """One file of a domain, read as far as is wanted, and further later on.

    Args:
        path: the file.
        begin: opens it.
        store: gets the tokens.
        limit_bytes: no document is longer; until it is opened that may be changed.
    """

    def __init__(self, path: Path, begin: Begin, store: TokenFile, limit_bytes: int) -> None:
        self.path, self._begin, self._store, self.limit_bytes = path, begin, store, limit_bytes
        self.size_bytes = path.stat().st_size
        self.documents, self.any_rendered = 0, False
        self.count, self.cap = 0, 0
        self._tokens: Generator[tuple[Document, Piece]] | None = None
        self._spans: list[slice] = []
        self._ahead: tuple[Document, Piece] | InvalidInputError | None = None
        self._exhausted, self._cut, self._inside = False, False, False

    def fill(self, wanted: int, *, whole: bool = False) -> None:
        """Read until there are so many tokens, or with `whole` the document in which there are."""
        while self.count < wanted or (whole and self._inside):
            found, self._ahead = self._look_ahead(), None
            if found is None:
                return
            if isinstance(found, InvalidInputError):
                raise found
            document, piece = found
            self.documents += not self._inside
            self._inside = not piece.last
            self.any_rendered |= document.rendered
            self._cut |= document.cut
            start = self._store.count
            self._store.append(piece.ids)
            self._spans.append(slice(start, self._store.count))
            self.count += len(piece.ids)

    def _look_ahead(self) -> tuple[Document, Piece] | InvalidInputError | None:
        """What comes next: tokens, a fault that is none as long as nobody reads so far, or nothing."""
        if self._ahead is None and not self._exhausted:
            self._tokens = self._tokens or self._begin(self.path, self.limit_bytes)
            try:
                self._ahead = next(self._tokens, None)
            except InvalidInputError as error:
                self._ahead = error
            self._exhausted = self._ahead is None
        return self._ahead

    @property
    def begun(self) -> bool:
        """Whether it was opened."""
        return self._tokens is not None

    @property
    def given(self) -> int:
        """Tokens that are in the pool."""
        return min(self.cap, self.count)

    @property
    def has_more(self) -> bool:
        """Whether reading on can give the pool more."""
        return self.count > self.cap or not self._exhausted

    def left_some(self) -> bool:
        """Whether some of its text is not in the pool; looks one document further, if it is open."""
        if self._tokens is None:
            return self.size_bytes > 0
        return self._cut or self.count > self.cap or self._look_ahead() is not None

    def close(self) -> None:
        """Read no further: the file is closed."""
        if self._tokens is not None:
            self._tokens.close()

    def parts(self, all_tokens: Ids) -> Iterator[Ids]:
        """Its tokens that are in the pool."""
        left = self.given
        for span in self._spans:
            part = all_tokens[span][:left]
            left -= len(part)
            if len(part):
                yield part


class Pool:
    """The tokens of one domain, and where they are from.

    Args:
        domain: its name.
        group: its sources.
        tokenizer: gives the tokens.
        chat: writes conversations.
        store: gets the tokens, behind those of other domains.
        room_tokens: read about so many.
        window: tokens of a window; where files share the pool, each has whole ones where it can.
        seed: for the order of the files.
    """

    def __init__(
        self,
        domain: str,
        group: Sequence[Source],
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        store: TokenFile,
        *,
        room_tokens: int,
        window: int,
        seed: int,
    ) -> None:
        self.domain, self.embedded = domain, any(source.embedded for source in group)
        paths = [path for source in group for path in source_files(source)]
        random.Random(f"files:{seed}:{domain}").shuffle(paths)
        embedded = {path for source in group if source.embedded for path in source_files(source)}
        self._store = store

        def begin(path: Path, limit_bytes: int) -> Generator[tuple[Document, Piece]]:
            return _tokens_of(path, tokenizer, chat, path in embedded, limit_bytes)

        files = [TextFile(path, begin, store, ROOM_BYTES * room_tokens) for path in paths]
        self._span = self._read(files, room_tokens, window)
        self.documents = sum(file.documents for file in files)
        self.any_rendered = any(file.any_rendered for file in files)
        self.notes = self._unread(files)
        for file in files:
            file.close()

    @property
    def tokens(self) -> Ids:
        """All of them, in order."""
        return self._store.array()[self._span]

    def _read(self, files: Sequence[TextFile], room_tokens: int, window: int) -> slice:
        """Where in the store the tokens are."""
        start = self._store.count
        for file in files:
            file.fill(start + room_tokens - self._store.count, whole=True)
            file.cap = file.count
            if self._store.count - start >= room_tokens:
                break
        if len(files) > 1 and not self.embedded and any(file.left_some() for file in files):
            share_out(files, room_tokens, window)
            tokens, start = self._store.array(), self._store.count
            for part in (part for file in files for part in file.parts(tokens)):
                self._store.append(part)
        return slice(start, self._store.count)

    def _unread(self, files: Sequence[TextFile]) -> tuple[str, ...]:
        """What of the domain's text was not read, in a sentence."""
        left = [file for file in files if file.left_some()]
        if self.embedded or not left:
            return ()
        begin, given = f"domain {self.domain}: windows are drawn from the first", f"{len(self.tokens):,} tokens of"
        if len(files) == 1:
            return (f"{begin} {given} {left[0].path.name}; the rest of it was not read",)
        none = [file.path.name for file in left if not file.given]
        named = f" (nothing of {', '.join(none[:3])}{', ...' if len(none) > 3 else ''})" if none else ""
        count = f"{len(files) - len(none)} of its {len(files)} files, in proportion to their sizes"
        return (f"{begin} {given} {count}; the rest was not read{named}",)


def share_out(files: Sequence[TextFile], room_tokens: int, window: int) -> None:
    """Set what each file gives to a pool: in proportion to its size, whole windows, at least one where there is room.

    What a file lacks is dealt out again. Of more files than the pool has windows, the first ones are taken.
    """
    for file in files:
        file.cap = 0
    while (left := room_tokens - sum(file.given for file in files)) >= window:
        begun = [file for file in files if file.cap and file.has_more]
        fresh = [file for file in files if not file.cap][: max(0, MOST_FILES - len(begun))]
        some = ([*fresh, *begun] if fresh else begun)[: left // window]
        if not some:
            return
        for file, windows in zip(some, dealt(left // window, [file.size_bytes for file in some]), strict=True):
            file.cap = file.given + windows * window
            if not file.begun:  # all of them are held at a time
                file.limit_bytes = 2 * ROOM_BYTES * file.cap
            file.fill(file.cap)


def dealt(windows: int, sizes: Sequence[int]) -> list[int]:
    """So many windows in proportion to sizes (largest remainders), at least one for each; there are enough for that."""
    exact = np.asarray(sizes, dtype=np.float64) + 1e-9
    exact *= windows / exact.sum()
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while counts.sum() > windows:  # what the small ones got above their part comes from the largest
        counts[np.argmax(counts)] -= 1
    for place in np.argsort(counts - exact, kind="stable")[: windows - counts.sum()]:
        counts[place] += 1
    return [int(count) for count in counts]


def _tokens_of(
    path: Path, tokenizer: Tokenizer, chat: ChatTemplate, embedded: bool, limit_bytes: int
) -> Generator[tuple[Document, Piece]]:
    for document in read_documents(path, chat, embedded=embedded, limit_bytes=limit_bytes):
        if document.text.strip():
            for piece in pieces(tokenizer, document.text, special=not document.rendered):
                yield document, piece
