"""From a file to its documents: plain text, JSON, CSV and Parquet, without reading more of it than is asked for.

    .jsonl, .ndjson    a JSON object on each line        .csv, .tsv    records under a line of names
    .json              a list of objects, or objects     .parquet      rows
    anything else      UTF-8 text, one document          .gz           of all but Parquet

Everything is read as data: nothing is unpickled. What is no text is refused by name.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moepress.calibration.records import NEEDS, RECORD_FIELDS, Conversation, content_of, listed
from moepress.calibration.sources import relative_to_library
from moepress.calibration.templates import ChatTemplate, Refused
from moepress.errors import InvalidInputError
from moepress.runs.files import require_plain

RECORD_BYTES = 256 << 20
"""No single record may be longer: it has to be in memory as a whole, several times over."""
_BATCH_CHATS, _BATCH_CHARS = 64, 1 << 20
_CHUNK_CHARS = 1 << 20
_ROWS_AT_ONCE = 32
_SNIFF_BYTES = 4096
_UTF8_MARK = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs.github.com/spec/"
_FORMATS = (
    (b"PK\x03\x04", "a zip archive (or an office document)", "unpack it"),
    (b"\x1f\x8b", "gzipped, which its name does not say", "let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it, or gzip it"),
    (b"BZh", "compressed with bzip2", "decompress it, or gzip it"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it, or gzip it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"%PDF", "a PDF", "extract its text"),
    (b"PAR1", "a Parquet file, which its name does not say", "let its name end in .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet"),
    (b"SQLite format 3", "a database", "write its text as .jsonl"),
    (b"GGUF", "a GGUF model", "name text"),
    (b"\x89PNG", "a picture", "name text"),
    (b"\xff\xd8\xff", "a picture", "name text"),
    (b"GIF8", "a picture", "name text"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8"),
    (_LFS, "a Git LFS pointer instead of the file", "fetch the file with `git lfs pull`"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text.

    Attributes:
        text: its text, or the beginning of it.
        rendered: whether a chat template wrote it (it then carries its own special tokens).
        cut: whether the limit left some of it unread.
    """

    text: str
    rendered: bool
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    where: str
    content: str | Conversation


Content = Callable[[object, str], str | Conversation]
"""What a record, as it is parsed, says; with where it stands, for messages."""


def read_documents(
    path: Path, chat: ChatTemplate, *, embedded: bool = False, limit_bytes: int | None = None
) -> Iterator[Document]:
    """Yields the documents of one file, lazily. Empty documents are kept: conventions need them.

    Args:
        path: see above; records are of the forms of `calibration.records`.
        chat: writes conversations, some at a time.
        embedded: Put the line `# ==== path ====` before a module of the standard library.
        limit_bytes: No document is longer than this: what comes after is cut off, before anything else is done to it.

    Raises:
        InvalidInputError: The file can not be read or decoded, or a record is not as above; names line or byte offset.
    """
    with _opened_as_text(path):
        if has_records(path):
            yield from _documents(_records(path, content_of), chat, limit_bytes)
        else:
            yield _plain_document(path, limit_bytes, embedded=embedded)


def has_records(path: Path) -> bool:
    """Whether a file is one of records by its name."""
    return _reader_of(path) is not None


def read_records(path: Path, content: Content) -> Iterator[tuple[str, str | Conversation]]:
    """Yields for each record of a file where it stands and what `content` makes of it, lazily.

    Raises:
        InvalidInputError: the file can not be read or decoded, or `content` refuses a record.
    """
    with _opened_as_text(path):
        for record in _records(path, content):
            yield record.where, record.content


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields for each line of a plain text where it stands and the line.

    Raises:
        InvalidInputError: the file can not be read or decoded.
    """
    with _opened_as_text(path):
        for number, line in enumerate(_plain_document(path, None, embedded=False).text.splitlines(), start=1):
            yield f"{path}, line {number}", line


@contextmanager
def _opened_as_text(path: Path) -> Iterator[None]:
    """Refuse what is no plain file of text; errors of reading become sentences."""
    try:
        require_plain(path)
        _require_text(path)
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(f"{path}: can not be read: {error}.") from error


def cut_text(text: str, limit_bytes: int | None) -> tuple[str, bool]:
    """At most so many bytes of UTF-8 from the beginning of a text, whole characters, and whether any were left out."""
    if limit_bytes is None or len(text) <= limit_bytes // 4:
        return text, False
    data = text[: limit_bytes + 1].encode()
    if len(data) <= limit_bytes:
        return text, False
    return data[:limit_bytes].decode("utf-8", "ignore"), True


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _require_text(path: Path) -> None:
    """Refuse what is no text by its first bytes; a name says too little."""
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    else:
        with _open(path) as file:
            start = file.read(_SNIFF_BYTES)
    found = next(((what, do) for mark, what, do in _FORMATS if start.startswith(mark)), None)
    if found is not None and not (path.suffix == ".parquet" and start.startswith(b"PAR1")):
        raise InvalidInputError(f"{path}: is {found[0]}, which is not read as text; {found[1]}.")
    if path.suffix != ".parquet" and b"\0" in start:
        raise InvalidInputError(
            f"{path}: has NUL bytes, as no text has (the first at byte offset {start.index(0)}); name a file of text."
        )


def _plain_document(path: Path, limit_bytes: int | None, *, embedded: bool) -> Document:
    with _open(path) as file:
        data = file.read() if limit_bytes is None else file.read(limit_bytes)
        cut = limit_bytes is not None and bool(file.read(1))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not (cut and error.reason == "unexpected end of data"):
            raise InvalidInputError(
                f"{path}: not UTF-8 text at byte offset {error.start}; convert the file."
            ) from error
        text = data[: error.start].decode("utf-8")  # the limit fell inside a character
    text = text.removeprefix("\ufeff")
    if embedded and path.suffix == ".py":
        text = f"# ==== {relative_to_library(path)} ====\n{text}"
    return Document(text=text, rendered=False, cut=cut)


def _documents(records: Iterator[_Record], chat: ChatTemplate, limit_bytes: int | None) -> Iterator[Document]:
    """Documents of records in their order; conversations that follow each other are written together."""
    waiting: list[_Record] = []
    size, end = 0, False
    failed: InvalidInputError | None = None
    while not end:
        try:
            record = next(records, None)
        except InvalidInputError as error:  # what was read before it counts, and may be all that is wanted
            record, failed = None, error
        end = record is None
        if record is not None and isinstance(record.content, Conversation) and chat.there:
            waiting.append(record)
            size += sum(len(str(message.get("content", ""))) for message in record.content.messages)
            if len(waiting) < _BATCH_CHATS and size < _BATCH_CHARS:
                continue
            record = None
        yield from _written(waiting, chat, limit_bytes)
        waiting, size = [], 0
        if record is not None:
            yield _document(record, _without_template(record), limit_bytes, rendered=False)
    if failed is not None:
        raise failed


def _written(records: list[_Record], chat: ChatTemplate, limit_bytes: int | None) -> Iterator[Document]:
    texts = chat.render([r.content for r in records if isinstance(r.content, Conversation)]) if records else []
    for record, text in zip(records, texts, strict=True):
        if isinstance(text, Refused):
            raise InvalidInputError(
                f"{record.where}: the tokenizer's chat template refuses this conversation: {text.reason}."
            )
        yield _document(record, text, limit_bytes, rendered=True)


def _without_template(record: _Record) -> str:
    if isinstance(record.content, str):
        return record.content
    if record.content.plain is None:
        raise InvalidInputError(
            f"{record.where}: a conversation, but the model's tokenizer has no chat template; give text records "
            "instead."
        )
    return record.content.plain


def _document(record: _Record, whole: str, limit_bytes: int | None, *, rendered: bool) -> Document:
    try:
        text, cut = cut_text(whole, limit_bytes)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{record.where}: the text has a lone surrogate (\\ud800 to \\udfff), no character."
        ) from error
    return Document(text=text, rendered=rendered, cut=cut)


def _json_lines(path: Path, content: Content) -> Iterator[_Record]:
    offset, number = 0, 0
    with _open(path) as file:
        while line := file.readline(RECORD_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > RECORD_BYTES:
                raise _too_long(where)
            data = line.removeprefix(_UTF8_MARK) if number == 1 else line
            try:
                record = json.loads(data.decode("utf-8")) if data.strip() else None
            except UnicodeDecodeError as error:
                start = offset + len(line) - len(data) + error.start
                raise InvalidInputError(f"{where}: not UTF-8 at byte offset {start}.") from error
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(f"{where}: not a JSON object: {error}.") from error
            offset += len(line)
            if data.strip():
                yield _Record(where=where, content=content(record, where))


def _too_long(where: str) -> InvalidInputError:
    return InvalidInputError(f"{where}: one record of more than {RECORD_BYTES >> 20} MiB; divide it into several.")


def _json_values(path: Path, content: Content) -> Iterator[_Record]:
    """Of a list of objects, or of objects that follow each other, as they come."""
    decoder, text, start, number, in_list, end = json.JSONDecoder(), "", 0, 0, False, False
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
        wanted = _CHUNK_CHARS
        while True:
            where = f"{path}, record {number + 1}"
            start = _skip(text, start, "," if in_list and number else "")
            if start < len(text) and not in_list and not number and text[start] == "[":
                in_list, start = True, start + 1
                continue
            if in_list and text[start : start + 1] == "]":
                return
            try:
                record, stop = decoder.raw_decode(text, start)
                if stop == len(text) and not end:
                    raise ValueError  # a number could go on
            except (ValueError, RecursionError) as error:
                if end and start == len(text) and not in_list:
                    return
                if end or isinstance(error, RecursionError):
                    raise InvalidInputError(f"{where}: not a JSON object: {error}.") from error
                text, end = _more(file, path, text[start:], wanted)
                start, wanted = 0, 2 * wanted
                if len(text) > RECORD_BYTES:
                    raise _too_long(where) from error
                continue
            number, start, wanted = number + 1, stop, _CHUNK_CHARS
            yield _Record(where=where, content=content(record, where))


def _skip(text: str, start: int, comma: str) -> int:
    """The next place that is neither blank nor a comma between values."""
    while start < len(text) and (text[start].isspace() or text[start] == comma):
        start += 1
    return start


def _more(file: io.TextIOWrapper, path: Path, kept: str, chars: int) -> tuple[str, bool]:
    """What was kept with more of the file behind it, and whether the file ends there."""
    try:
        more = file.read(chars)
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not UTF-8 text ({error.reason}); convert the file.") from error
    return kept + more, len(more) < chars


def _csv_records(path: Path, content: Content) -> Iterator[_Record]:
    csv.field_size_limit(RECORD_BYTES)
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        try:
            names = file.readline(_SNIFF_BYTES)
            kind = "\t" if ".tsv" in path.suffixes else ";" if names.count(";") > names.count(",") else ","
            header = next(csv.reader([names], delimiter=kind), [])
            if not set(header) & set(RECORD_FIELDS):
                raise InvalidInputError(f"{path}: {NEEDS}; its columns are {listed(header) or 'none'}.")
            for number, row in enumerate(csv.reader(file, delimiter=kind), start=1):
                where = f"{path}, record {number}"
                if row:
                    yield _Record(where=where, content=content(dict(zip(header, row, strict=False)), where))
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{path}: not UTF-8 text ({error.reason}); convert the file.") from error
        except csv.Error as error:
            raise InvalidInputError(f"{path}: not a CSV file that can be read: {error}.") from error


def _parquet_records(path: Path, content: Content) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            names = [name for name in RECORD_FIELDS if name in columns]
            if not names:
                raise InvalidInputError(f"{path}, row 0: {NEEDS}; its columns are {listed(columns) or 'none'}.")
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                for record in batch.to_pylist():
                    where = f"{path}, row {row}"
                    yield _Record(where=where, content=content(_without_nulls(record), where))
                    row += 1
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(f"{path}: not a Parquet file that can be read: {reason}.") from error


def _without_nulls(value: Any) -> Any:
    """Arrow fills in nulls for whatever keys other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, Content], Iterator[_Record]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json_values,
    **dict.fromkeys((".csv", ".tsv"), _csv_records),
    ".parquet": _parquet_records,
}


def _reader_of(path: Path) -> Callable[[Path, Content], Iterator[_Record]] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((reader for end, reader in _READERS.items() if name.endswith(end)), None)


def _records(path: Path, content: Content) -> Iterator[_Record]:
    reader = _reader_of(path)
    assert reader is not None, "of plain text there are no records"
    return reader(path, content)
