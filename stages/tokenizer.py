"""A model's tokenizer: the ids of its tokenizer.json, whatever class transformers makes of it. No code of it is run.

transformers 5 builds the tokenizers of many classes anew and takes only vocabulary and merges from tokenizer.json, so
that a file with its own pre-tokenizer gives other ids there than everywhere else (transformers 45920, 45488, 48206).
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.calibration.sources import embedded_sources, source_files
from moepress.converters.gguf.file import open_gguf
from moepress.converters.gguf.vocabulary import tokenizer_of
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import check_files
from moepress.models.storage.misnamed import misnamed

FILE = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OTHERS = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tekken.json")
_PARTS = ("normalizer", "pre_tokenizer", "model")
_PROBES = (
    "In 1234567 years: 20,000 leagues, 3.14159 and 0x7fff.",
    "\n\n\tdef f(x):\n        return  x**2  # don't, we'll, I'M\n\r\n ",
    "Straße, naïve, cafe\u0301, 中文字符, ひらがな, العربية, हिन्दी, 🙂👩\u200d💻, ﬁ, Ａ, \u00a0\u2028",
    "  two  spaces   three\t\ttabs<|end|> [INST] http://a.b/c?d=e_f-G;H!!",
)
_LARGEST_ID = 1 << 24
_PROBED_CHARACTERS = 4000  # of every embedded text


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A tokenizer of transformers, and what is to be said of it."""

    tokenizer: Any
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path) -> Read:
    """The tokenizer of a folder; of a GGUF file the one that lies beside it, or its own.

    Raises:
        InvalidInputError: there is none, or a file of it is broken.
        UnsupportedError: it needs code of the folder, or a package that is not installed.
    """
    from transformers import AutoTokenizer

    if folder.is_file():
        if _tokenizer_files(folder.parent):
            return read_tokenizer(folder.parent)
        return Read(tokenizer=tokenizer_of(open_gguf(folder)))
    check_files(folder)
    _require_files(folder)
    raw = _raw(folder)
    if raw is None:
        _require_readable(folder)
    notes: tuple[str, ...] = ()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        if raw is None:
            raise _unreadable(folder, error) from error
        tokenizer = _of_file(folder)
        why = "needs code of its own, which is not run" if _needs_code(folder) else _reason(error)
        notes = (f"transformers can not make the tokenizer that {folder} names ({why}); its {FILE} is used alone.",)
    if raw is not None and not tokenizer.is_fast:
        tokenizer = _of_file(folder)
    if raw is None:
        return Read(tokenizer=tokenizer, notes=notes)
    return Read(tokenizer=tokenizer, notes=(*notes, *_by_file(folder, tokenizer, raw)))


def _of_file(folder: Path) -> Any:
    """The tokenizer that transformers makes of tokenizer.json alone, whatever class the config names."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # transformers raises many types here
        raise _unreadable(folder, error) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".:")[:200]


def _unreadable(folder: Path, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"{folder} has no tokenizer that transformers can read ({_reason(error)}); put the tokenizer files of the "
        "original model into it."
    )


def _tokenizer_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.name in (FILE, *_SENTENCEPIECE, *_OTHERS) or file.suffix in (".model", ".tiktoken"))
    ]


def _require_files(folder: Path) -> None:
    found = _tokenizer_files(folder)
    if not [file for file in found if file.name not in ("tokenizer_config.json", "special_tokens_map.json")]:
        raise InvalidInputError(
            f"{folder} has no tokenizer (no {FILE}, tokenizer.model or vocab.json); copy the tokenizer files of the "
            "original model into it."
        )
    for file in found:
        if other := misnamed(file):
            raise InvalidInputError(other)


def _raw(folder: Path) -> Any:
    """What the library `tokenizers` reads in the folder's file; None where there is no file."""
    from tokenizers import Tokenizer

    file = folder / FILE
    if not file.is_file():
        return None
    try:
        raw = Tokenizer.from_file(str(file))
        most = max(raw.get_vocab().values(), default=0)
    except Exception as error:  # a bare Exception of Rust
        reason = str(error).splitlines()[0][:200]
        raise InvalidInputError(
            f"{file} is no tokenizer that can be read ({reason}); download it again, or update the package tokenizers."
        ) from error
    if most > _LARGEST_ID:  # the library counts up to it
        raise InvalidInputError(f"{file} has a token of the id {most}, which no vocabulary reaches; download it again.")
    return raw


def _needs_code(folder: Path) -> str | None:
    """The file of code that the tokenizer's config names, or None."""
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("auto_map") if file.is_file() else None
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    first = next((c for c in classes if isinstance(c, str)), None) if isinstance(classes, list) else classes
    return first.partition(".")[0].rpartition("--")[2] + ".py" if isinstance(first, str) else None


def _require_readable(folder: Path) -> None:
    """Refuse what can not be read without code or packages that are not there; there is no tokenizer.json."""
    code = _needs_code(folder)
    if code is not None:
        raise UnsupportedError(
            f"The tokenizer in {folder} needs code of its own ({code}), which moepress never runs, and there is no "
            f"{FILE}; "
            'convert it once: docs/faq.md, "The tokenizer needs code of its own", has the script.'
        )
    pieces = next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
    if pieces is not None and importlib.util.find_spec("sentencepiece") is None:
        raise UnsupportedError(
            f"The tokenizer in {folder} is a SentencePiece model ({pieces}) without {FILE}, and the package "
            "sentencepiece "
            "is not installed; `pip install sentencepiece protobuf`, or put the tokenizer.json of the model into the "
            "folder."
        )


def _by_file(folder: Path, tokenizer: Any, raw: Any) -> Iterator[str]:
    """Give the tokenizer the file's own rules where transformers has others; say so where the ids differ."""
    made = tokenizer.backend_tokenizer
    if all(_state(getattr(made, part)) == _state(getattr(raw, part)) for part in _PARTS):
        return
    differs = any(
        made.encode(text, add_special_tokens=False).ids != raw.encode(text, add_special_tokens=False).ids
        for text in _probes()
    )
    _add_tokens(folder, made, raw)
    raw.no_truncation()
    raw.no_padding()
    tokenizer._tokenizer = raw
    if differs:
        yield (
            f"transformers reads {folder / FILE} as {type(tokenizer).__name__}, which gives other token ids than the "
            "file "
            "itself: calibration and evaluation use those of the file. Runtimes that take transformers' tokenizer will "
            "not, until tokenizer_config.json names PreTrainedTokenizerFast as tokenizer_class."
        )


def _state(part: Any) -> object:
    return None if part is None else part.__getstate__()


def _probes() -> Iterator[str]:
    yield from _PROBES
    for source in embedded_sources("calibration"):
        for path in source_files(source):
            yield path.read_text(encoding="utf-8")[:_PROBED_CHARACTERS]


def _add_tokens(folder: Path, made: Any, raw: Any) -> None:
    """Tokens that only tokenizer_config.json adds, under the ids that they have there."""
    own = raw.get_added_tokens_decoder()
    for number, token in sorted(made.get_added_tokens_decoder().items()):
        if number in own or raw.token_to_id(token.content) == number:
            continue
        (raw.add_special_tokens if token.special else raw.add_tokens)([token])
        if raw.token_to_id(token.content) != number:
            raise InvalidInputError(
                f"{folder}: tokenizer_config.json gives {token.content!r} the id {number}, and {FILE} has no place "
                "for it "
                "there; take both files from the original model."
            )
