"""Where text comes from: options to sources, sources to files, files to documents.

    --calibration FILE|DIR|owner/name[:pattern]   --domain NAME=FILE        nothing given
                        │ parse_sources                                          │ embedded_sources
                        ▼                                                        ▼
                 Source(domain, location, embedded) ──source_files──▶ paths ──read_documents──▶ Document(text, rendered)

Everything is read as data: UTF-8 text, JSON lines and Parquet (the first two also gzipped); nothing is unpickled.
"""

import gzip
import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import open_plain, require_plain

Split = Literal["calibration", "evaluation"]

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
FOLDER_SUFFIXES = (*PLAIN_SUFFIXES, *RECORD_SUFFIXES, ".txt.gz", ".jsonl.gz")
HUB_SUFFIXES = (".parquet", ".jsonl", ".txt")
RECORD_FIELDS = ("text", "messages", "prompt", "completion")
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/(?P<name>[A-Za-z0-9][\w.-]*))(?::(?P<pattern>.+))?")

EMBEDDED_TEXT_DOMAINS = ("german", "math", "wiki")
PYTHON_DOMAIN = "python"
PYTHON_BYTES_CAP = 400_000  # for each split
PYTHON_MODULES = """
    abc argparse bisect calendar cmd code colorsys contextlib copy csv email/utils filecmp fileinput fnmatch fractions
    functools getopt glob graphlib gzip hashlib heapq html/parser json/decoder json/encoder json/scanner linecache netrc
    numbers operator pprint queue quopri random reprlib secrets selectors shlex string tempfile textwrap traceback types
    urllib/robotparser uuid warnings weakref zipapp
"""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer (`AutoTokenizer.from_pretrained`)."""

    is_fast: bool
    bos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """Tokenize one text."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """The text of some tokens."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The text of one conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One place that text of one domain is taken from.

    Attributes:
        domain: The name that statistics and reports use; several sources may share it.
        location: The path of a file, or a hub dataset `owner/name[:file-pattern]`.
        embedded: Whether this is the default text that comes with moepress (so that output can say so).
    """

    domain: str
    location: str
    embedded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, and whether a chat template wrote it (it then carries its own special tokens)."""

    text: str
    rendered: bool


def parse_sources(calibration: Sequence[str], domains: Sequence[str]) -> tuple[Source, ...]:
    """Reads the options `--calibration` and `--domain` into sources; looks at folders, opens no file.

    Args:
        calibration: Each a file (its stem is its domain), a folder (see below) or a hub dataset
            `owner/name[:file-pattern]` (the domain is `name`). A folder whose sub-folders hold text has one domain
            for each such sub-folder, searched through; otherwise each text file in it is a domain.
        domains: Each `NAME=FILE`, where FILE may also be a folder (all its text) or a dataset; a name may come again.

    Returns:
        The sources in the order given; files of a folder in the order of their names. Nothing given: nothing.

    Raises:
        UsageError: An entry of `domains` is not `NAME=FILE`.
        InvalidInputError: A location does not exist, or a folder holds no text, or text both beside and in sub-folders.
    """
    sources: list[Source] = []
    for location in calibration:
        path = Path(location).expanduser()
        if path.is_dir():
            sources += _folder_sources(path)
        else:
            sources.append(Source(domain=_domain_of(location), location=_checked(location), embedded=False))
    for option in domains:
        domain, equals, location = option.partition("=")
        if not (domain.strip() and equals and location):
            raise UsageError(f"--domain {option!r} is not NAME=FILE, for example --domain code=src/train.jsonl.")
        path = Path(location).expanduser()
        found = [str(file) for file in _text_files(path)] if path.is_dir() else [_checked(location)]
        if not found:
            raise InvalidInputError(f"{path}: the folder holds no text file ({', '.join(FOLDER_SUFFIXES)}).")
        sources += [Source(domain=domain.strip(), location=file, embedded=False) for file in found]
    return tuple(sources)


def embedded_sources(split: Split) -> tuple[Source, ...]:
    """The package's own text: German, mathematics, encyclopedia, and Python from the installed standard library.

    A module of the standard library belongs to one split by the SHA-256 of its name, so the splits never overlap; each
    has at most 400 kB of it. That text depends on the Python version; a corpus's digest tells it apart.

    Raises:
        InvalidInputError: The package's text is missing (a broken installation).
    """
    folder = Path(str(files("moepress.models.demo"))) / "text"
    sources = []
    for domain in EMBEDDED_TEXT_DOMAINS:
        path = folder / domain / f"{split}.txt"
        if not path.is_file():
            raise InvalidInputError(f"{path}: this part of the moepress package is missing; install moepress again.")
        sources.append(Source(domain=domain, location=str(path), embedded=True))
    total_bytes = 0
    for module in sorted(PYTHON_MODULES.split()):
        path = _standard_library() / f"{module}.py"
        is_evaluation = hashlib.sha256(module.encode()).digest()[0] % 2 == 1
        if is_evaluation != (split == "evaluation") or not path.is_file():
            continue
        size_bytes = path.stat().st_size
        if total_bytes + size_bytes <= PYTHON_BYTES_CAP:
            total_bytes += size_bytes
            sources.append(Source(domain=PYTHON_DOMAIN, location=str(path), embedded=True))
    return tuple(sources)


def source_files(source: Source) -> tuple[Path, ...]:
    """The files of a source, in the order of their names; a hub dataset is fetched if the local cache lacks it.

    Raises:
        InvalidInputError: The file is gone, or the dataset can not be had or holds no file that can be read.
    """
    path = Path(source.location).expanduser()
    if path.is_file():
        return (path,)
    match = HUB_ID.fullmatch(_checked(source.location))
    assert match is not None  # _checked leaves a file or a dataset
    patterns = _hub_patterns(match["pattern"])
    found = _snapshot_files(match["repo"], patterns, local_files_only=True)
    if isinstance(found, tuple) and found:
        return found
    found = _snapshot_files(match["repo"], patterns, local_files_only=False)
    if isinstance(found, Exception):
        reason = str(found).strip().partition("\n")[0]
        raise InvalidInputError(
            f"{source.location}: no such file here, and the hub dataset of that name can not be fetched ({reason}); "
            f"check the name, or download it where there is a network and give the path of the file."
        ) from found
    if not found:
        raise InvalidInputError(
            f"{source.location}: the dataset has no file that matches {' or '.join(patterns)}; "
            f"name its files, as in {match['repo']}:data/train*.parquet."
        )
    return found


def read_documents(
    path: Path, tokenizer: Tokenizer, *, embedded: bool = False, limit_bytes: int | None = None
) -> Iterator[Document]:
    """Yields the documents of one file, lazily: lines of JSON and row groups of Parquet are read as they are asked for.

    A plain text file is one document. A record has "text", or "messages" (written by the tokenizer's chat template), or
    "prompt" and "completion" (two texts, or two lists of messages). Empty documents are kept: conventions need them.

    Args:
        path: `.jsonl`, `.parquet`, or anything else as plain UTF-8 text; `.gz` of text and `.jsonl`.
        tokenizer: Its chat template writes conversations.
        embedded: Put the line `# ==== path ====` before a module of the standard library.
        limit_bytes: Read no more than this of a plain text file.

    Raises:
        InvalidInputError: The file can not be read or decoded, or a record is not as above; names line or byte offset.
    """
    try:
        plain = path.name.removesuffix(".gz")
        if plain.endswith(".jsonl"):
            yield from _json_documents(path, tokenizer)
        elif path.suffix == ".parquet":
            yield from _parquet_documents(path, tokenizer)
        elif plain.endswith(".json"):
            raise InvalidInputError(f"{path}: .json is not read; write one JSON object a line and name it .jsonl.")
        else:
            text = _plain_text(path, limit_bytes)
            if embedded and path.suffix == ".py":
                text = f"# ==== {path.relative_to(_standard_library()).as_posix()} ====\n{text}"
            yield Document(text=text, rendered=False)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(f"{path}: can not be read: {error}.") from error


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _domain_of(location: str) -> str:
    """The stem of a path without its format's suffixes; the name of a dataset."""
    match = HUB_ID.fullmatch(location)
    if match and not Path(location).expanduser().exists():
        return match["name"]
    return Path(location.removesuffix(".gz")).stem


def _checked(location: str) -> str:
    """The location, if it is a file or can be the name of a hub dataset."""
    path = Path(location).expanduser()
    if path.is_file():
        return location
    if path.exists() and not path.is_dir():
        require_plain(path)
    if HUB_ID.fullmatch(location) is None or (location.endswith(FOLDER_SUFFIXES) and ":" not in location):
        raise InvalidInputError(f"{location}: no such file or folder, nor a hub dataset's owner/name[:file-pattern].")
    return location


def _text_files(folder: Path, *, recurse: bool = True) -> list[Path]:
    found = folder.rglob("*") if recurse else folder.iterdir()
    return sorted(
        path
        for path in found
        if path.name.endswith(FOLDER_SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _folder_sources(folder: Path) -> list[Source]:
    loose = _text_files(folder, recurse=False)
    nested = [path for path in _text_files(folder) if path.parent != folder]
    if loose and nested:
        raise InvalidInputError(
            f"{folder}: holds text beside and in sub-folders ({loose[0].name}, {nested[0].relative_to(folder)}), so "
            f"its domains are unclear; keep one sub-folder for each domain, or name the inputs one by one."
        )
    if not (loose or nested):
        raise InvalidInputError(f"{folder}: the folder holds no text file ({', '.join(FOLDER_SUFFIXES)}).")
    named = [(path.relative_to(folder).parts[0], path) for path in nested] or [(_domain_of(str(p)), p) for p in loose]
    return [Source(domain=domain, location=str(path), embedded=False) for domain, path in named]


def _hub_patterns(pattern: str | None) -> list[str]:
    if pattern is None:
        return [f"*{suffix}" for suffix in HUB_SUFFIXES]
    return (
        [pattern] if pattern.endswith(HUB_SUFFIXES) else [f"{pattern.rstrip('*')}*{suffix}" for suffix in HUB_SUFFIXES]
    )


def _snapshot_files(repo: str, patterns: list[str], *, local_files_only: bool) -> tuple[Path, ...] | Exception:
    """The snapshot's files that match, or why there is no snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The bases hold the HTTP client's own error, whichever client this version of huggingface_hub uses.
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        snapshot = Path(
            snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, local_files_only=local_files_only)
        )
    except expected as error:
        return error
    names = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    return tuple(snapshot / name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _open(path: Path) -> IO[bytes]:
    return gzip.open(open_plain(path), "rb") if path.suffix == ".gz" else open_plain(path)  # type: ignore[return-value]


def _plain_text(path: Path, limit_bytes: int | None) -> str:
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
    return text.removeprefix("\ufeff")


def _json_documents(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{where}: not UTF-8 at byte offset {offset + error.start}.") from error
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(f"{where}: not a JSON object: {error}.") from error
            offset += len(line)
            if line.strip():
                yield _document(record, where, tokenizer)


def _parquet_documents(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = [name for name in RECORD_FIELDS if name in table.schema_arrow.names]
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=names[:1] if names[:1] != ["prompt"] else names):
                for record in batch.to_pylist():
                    yield _document(record, f"{path}, row {row}", tokenizer)
                    row += 1
    except pa.ArrowException as error:
        raise InvalidInputError(f"{path}: not a Parquet file that can be read: {error}.") from error


def _document(record: object, where: str, tokenizer: Tokenizer) -> Document:
    """The document of one JSON object or Parquet row."""
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"{where}: not a JSON object with text, messages, or prompt and completion.")
    content = record.get("text", record.get("messages"))
    if content is None and "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if type(prompt) is type(completion) and isinstance(prompt, str | list):
            content = prompt + completion
    if isinstance(content, str):
        document = Document(text=content, rendered=False)
    elif isinstance(content, list) and content and "text" not in record:
        document = Document(text=_rendered(content, where, tokenizer), rendered=True)
    else:
        raise InvalidInputError(f"{where}: needs text (a string), messages (a list), or prompt and completion.")
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{where}: the text has a lone surrogate (\\ud800 to \\udfff), no character."
        ) from error
    return document


def _rendered(messages: list[object], where: str, tokenizer: Tokenizer) -> str:
    """One conversation as the tokenizer's chat template writes it."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            f"{where}: a conversation, but the model's tokenizer has no chat template; give text records instead."
        )
    turns = []
    for message in messages:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise InvalidInputError(f"{where}: each message needs a role and a content.")
        turns.append({key: value for key, value in message.items() if value is not None})  # Parquet fills in nulls
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{where}: the tokenizer's chat template refuses this conversation: {error}."
        ) from error
