"""Where text comes from: options to sources, sources to files; `calibration.documents` reads these.

--calibration FILE|DIR|owner/name[:pattern]   --domain NAME=FILE        nothing given
                    │ parse_sources                                          │ embedded_sources
                    ▼                                                        ▼
             Source(domain, location, embedded) ──source_files──▶ paths
"""

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Literal

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import require_plain

Split = Literal["calibration", "evaluation"]

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
FOLDER_SUFFIXES = (*PLAIN_SUFFIXES, *RECORD_SUFFIXES, ".txt.gz", ".jsonl.gz")
SECOND_SUFFIXES = (".json", ".csv", ".tsv", ".ndjson")
"""Of a folder read only where it has none of the others: beside them such files are mostly about the text."""
HUB_SUFFIXES = (".parquet", ".jsonl", ".txt")
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


def parse_sources(calibration: Sequence[str], domains: Sequence[str]) -> tuple[Source, ...]:
    """Reads the options `--calibration` and `--domain` into sources; looks at folders, opens no file.

    Args:
        calibration: Each a file (its stem is its domain; of files with one stem in several folders, the folder), a
            folder (see below) or a hub dataset `owner/name[:file-pattern]` (the domain is `name`). A folder whose
            sub-folders hold text has one domain for each such sub-folder, searched through; otherwise each text file
            in it is a domain.
        domains: Each `NAME=FILE`, where FILE may also be a folder (all its text) or a dataset; a name may come again.

    Returns:
        The sources in the order given, each once; files of a folder by their names. Nothing given: nothing.

    Raises:
        UsageError: An entry of `domains` is not `NAME=FILE`.
        InvalidInputError: A location does not exist or is no regular file, or a folder holds no text, or text both
            beside and in sub-folders.
    """
    sources: list[Source] = []
    for location in calibration:
        path = _path(location)
        if path.is_dir():
            sources += _folder_sources(path)
        else:
            sources.append(Source(domain=_domain_of(location), location=_checked(location), embedded=False))
    sources = _told_apart(sources)
    for option in domains:
        domain, equals, location = option.partition("=")
        if not (domain.strip() and equals and location):
            raise UsageError(f"--domain {option!r} is not NAME=FILE, for example --domain code=src/train.jsonl.")
        path = _path(location)
        found = [str(file) for file in _text_files(path)] if path.is_dir() else [_checked(location)]
        if not found:
            raise InvalidInputError(f"{path}: the folder holds no text file ({', '.join(FOLDER_SUFFIXES)}).")
        sources += [Source(domain=domain.strip(), location=file, embedded=False) for file in found]
    once = {(source.domain, _place(source.location)): source for source in reversed(sources)}
    return tuple(reversed(once.values()))


def _path(location: str) -> Path:
    """The location as a path that can be asked what it is."""
    if not location.strip():
        raise UsageError("a name of text is empty; give a file, a folder or a data set, or leave the option out.")
    try:
        path = Path(location).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{location[:80]!r} can not be looked at ({reason}); check the name.") from error
    return path


def _place(location: str) -> Path | str:
    path = Path(location).expanduser()
    return path.resolve() if path.is_file() else location


def _told_apart(sources: list[Source]) -> list[Source]:
    """Files of one stem that lie in several folders become domains of these: de/train.txt and en/train.txt."""
    by_stem: dict[str, list[Path]] = {}
    for source in sources:
        path = Path(source.location).expanduser()
        if path.is_file() and _domain_of(source.location) == source.domain:
            by_stem.setdefault(source.domain, []).append(path.absolute().parent)
    names = {stem: _folder_names(folders) for stem, folders in by_stem.items() if len(set(folders)) > 1}
    return [
        replace(
            source, domain=names[source.domain].get(Path(source.location).expanduser().absolute().parent, source.domain)
        )
        if source.domain in names and _domain_of(source.location) == source.domain
        else source
        for source in sources
    ]


def _folder_names(folders: Sequence[Path]) -> dict[Path, str]:
    """A name for each folder: the last part of its path in which all of them differ, else all of the path's end."""
    different = list(dict.fromkeys(folders))
    depth = min(len(folder.parts) for folder in different)
    for place in range(1, depth + 1):
        names = [folder.parts[-place] for folder in different]
        if len(set(names)) == len(different):
            return dict(zip(different, names, strict=True))
    for length in range(2, max(len(folder.parts) for folder in different) + 1):
        names = ["-".join(folder.parts[-length:]) for folder in different]
        if len(set(names)) == len(different):
            break
    return dict(zip(different, names, strict=True))


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


def relative_to_library(path: Path) -> str:
    """The place of a module in the standard library."""
    return path.relative_to(_standard_library()).as_posix()


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
    there = sorted(
        path
        for path in (folder.rglob("*") if recurse else folder.iterdir())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    second = [*SECOND_SUFFIXES, *(f"{suffix}.gz" for suffix in SECOND_SUFFIXES)]
    for suffixes in (FOLDER_SUFFIXES, tuple(second)):
        found = [path for path in there if path.name.endswith(suffixes)]
        if found:
            return found
    return []


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
    if pattern.removesuffix(".gz").endswith((*HUB_SUFFIXES, *SECOND_SUFFIXES)):
        return [pattern]
    return [f"{pattern.rstrip('*')}*{suffix}" for suffix in HUB_SUFFIXES]


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
