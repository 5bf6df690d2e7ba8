"""What is asked for by name, looked at without lm-eval and torch, so that wrong names are refused before any work."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from moepress.errors import UnsupportedError, UsageError

INSTALL = "pip install 'moepress[eval]'"
_LEAST, _BELOW = (0, 4, 13), (0, 5)  # of lm-eval, as the extra has it

OWN_PREFIX = "moepress_"
CONTINUATION, SUMS = f"{OWN_PREFIX}continuation", f"{OWN_PREFIX}sums"
OWN = (CONTINUATION, SUMS)
"""Tasks that need no lm-evaluation-harness."""


def harness_version() -> str | None:
    """The version of lm-eval; None where it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_harness(what: str) -> None:
    """Refuse where lm-evaluation-harness is not installed, or is one whose ways are not known.

    Args:
        what: needs it, for the message.

    Raises:
        UnsupportedError: naming the extra.
    """
    version = harness_version()
    if version is None or importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError(f"{what} needs lm-evaluation-harness (lm-eval); install it with: {INSTALL}")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if not _LEAST <= numbers < _BELOW:
        raise UnsupportedError(
            f"{what} needs lm-eval of at least {'.'.join(map(str, _LEAST))} and below {'.'.join(map(str, _BELOW))}, "
            f"and {version} is installed; install the one of the extra: {INSTALL}"
        )


def is_place(name: str) -> bool:
    """Whether a name of --tasks is that of a file or folder."""
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name


def check_names(names: Sequence[str], models: Sequence[Path]) -> None:
    """Refuse what is wrong with names of tasks, as far as it is seen without lm-eval.

    Args:
        names: of tasks, groups, files and folders.
        models: folders and files of the models that are compared.

    Raises:
        UsageError: a name is not there, or a file lies in a model's folder.
        UnsupportedError: lm-eval is needed and not installed.
    """
    for name in names:
        if is_place(name):
            _check_place(Path(name).expanduser(), models)
        elif name.startswith(OWN_PREFIX):
            require_own(name)
    others = [name for name in names if name not in OWN]
    if others:
        require_harness(f"--tasks {others[0]}")


def _check_place(place: Path, models: Sequence[Path]) -> None:
    if not place.exists():
        raise UsageError(f"There is no task file {place}; give a YAML file of lm-eval, a folder of them, or a name.")
    if place.is_dir() and not any(place.rglob("*.yaml")):
        raise UsageError(f"The folder {place} holds no YAML file of a task.")
    folders = {model.resolve() for model in models if model.is_dir()}  # a GGUF file may lie among the user's own
    for lies in {place.absolute(), place.resolve()}:
        inside = next((f for f in (lies, *lies.parents) if f in folders), None)
        if inside is None and not place.is_dir() and (lies.parent / "config.json").exists():
            inside = lies.parent
        if inside is not None:
            raise UsageError(
                f"The task file {place} lies in a model's folder ({inside}), and a task file may run code, which "
                "moepress never takes from there; look at it, and copy it elsewhere if it is yours."
            )


def require_own(name: str) -> None:
    """Refuse a name that begins as ours do and is none.

    Raises:
        UsageError: with the names that there are.
    """
    if name not in OWN:
        raise UsageError(f"There is no task {name}; moepress's own are {' and '.join(OWN)}.")


def check_endpoint(url: str, option: str = "--endpoint") -> str:
    """The address without a slash at its end.

    Raises:
        UsageError: it is no address of a server.
    """
    try:
        parts = urlsplit(url)
        named = parts.hostname and parts.port != 0
    except ValueError:
        named = None
    if not named or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(f"{option} {url!r} is no address; write for example http://localhost:8000/v1.")
    return url.rstrip("/").removesuffix("/completions")
