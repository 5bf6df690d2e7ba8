"""A report without the places of this machine: folders and files by their names, for it is shown to others."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moepress.hub.snapshot import origin_of
from moepress.validation.report.schema import Report

_PATH = re.compile(r"""(?<![^\s'"=(\[`,:<])(?:~|(?<!:)/[^\s'"`)\],:;<>/]+)/[^\s'"`)\],:;<>]+""")
"""A path from the root or the home folder, of two parts or more, as it stands in a sentence."""


def without_places(report: Report) -> Report:
    """The report with absolute paths cut to their last names, wherever they stand; what models wrote stays as it is."""
    written = {"samples", "generation"}
    data = report.model_dump(mode="json", exclude=written)
    known = sorted(set(_known(report)), key=len, reverse=True)
    cut = Report.model_validate(_mapped(data, known))
    return cut.model_copy(update={name: getattr(report, name) for name in written})


def _known(report: Report) -> Iterator[str]:
    """Absolute paths that stand alone, which may hold spaces: in commands, in the recipe and as sources."""
    words = [word for command in report.commands for word in _words(command)]
    words += _strings(_recipe(report.recipe or ""))
    words += report.calibration.sources if report.calibration is not None else ()
    for word in words:
        path = word.partition("=")[2] if "=/" in word else word
        if path.startswith("/") and len(path) > 1:
            yield path


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _recipe(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _mapped(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _cut(value, known)
    if isinstance(value, list):
        return [_mapped(part, known) for part in value]
    if isinstance(value, dict):
        return {_cut(key, known): _mapped(part, known) for key, part in value.items()}
    return value


def _cut(text: str, known: list[str]) -> str:
    if "/" not in text:
        return text
    for path in known:
        text = re.sub(rf"""(?<![^\s'"=(\[`,:]){re.escape(path)}(?![\w-])""", lambda found: _name(found[0]), text)
    return _PATH.sub(lambda found: _name(found[0]), text)


def _name(path: str) -> str:
    stripped = path.rstrip("/.")
    return str(origin_of(Path(stripped)) or Path(stripped).name) + path[len(stripped) :].replace("/", "")
