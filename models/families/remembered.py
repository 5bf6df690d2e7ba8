"""What was once asked of transformers, kept in the user's cache: asking imports torch and builds a model."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.models.families.hf_config import DROPPED_KEYS


def place_of(kind: str, config: Mapping[str, Any], more: object = None) -> Path:
    """The file of an answer that depends on a config, on our code and transformers' version, and on `more`, plain JSON.

    Args:
        kind: the folder of answers of one sort.
        config: config.json.
        more: what else it depends on.
    """
    from platformdirs import user_cache_path

    asked: dict[str, Any] = {
        "config": {k: v for k, v in config.items() if k not in DROPPED_KEYS},
        "moepress": [__version__, _code()],
        "transformers": importlib.metadata.version("transformers"),
    }
    if more is not None:
        asked["more"] = more
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return user_cache_path("moepress") / kind / f"{digest}.json"


@functools.cache
def _code() -> str:
    """Digest of the sources that answer: between two releases the version stays and answers change."""
    found, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        found.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def keep(file: Path, answer: Mapping[str, Any]) -> None:
    """Keep an answer; a cache: where it can not be written, the next one asks again."""
    if file.is_file():
        return
    with contextlib.suppress(OSError, ValueError):
        _write(file, json.dumps(answer, allow_nan=False))


def recall(file: Path) -> dict[str, Any] | None:
    """What was kept; None where there is nothing, or nothing sound."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
