"""The tensors that transformers' model of a config has: asked of the model once, then remembered in the user's cache.

Building the model on the meta device imports torch and the model's code, seconds in all; what comes of it are names,
shapes and numbers. They depend on the config and on transformers' version alone, which are the key that they are kept
under. Who refuses a folder does so by the model itself, not from memory (`completeness`).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.models.families.hf_config import DROPPED_KEYS


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a config stands for.

    Attributes:
        shapes: transformers' names of all parameters and buffers -> shape.
        config: the config as transformers reads it, defaults included; plain values only.
        remembered: it comes from the cache.
    """

    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    remembered: bool = False


def expected_of(config: Mapping[str, Any]) -> Expected:
    """From the cache, or of a model that is built.

    Raises:
        InvalidInputError: the numbers in the config do not make a model.
    """
    found = _recall(_file(config))
    return built(config) if found is None else found


def built(config: Mapping[str, Any]) -> Expected:
    """Of transformers' model, whatever is remembered.

    Raises:
        InvalidInputError: the numbers in the config do not make a model.
    """
    from moepress.models.forward.skeleton import build_skeleton

    return remember(config, build_skeleton(config))


def remember(config: Mapping[str, Any], model: Any) -> Expected:
    """Of a model that somebody has built of that config, for the next process to recall."""
    plain = {k: v for k, v in vars(model.config).items() if v is None or isinstance(v, bool | int | float | str)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = _file(config)
    if not file.is_file():
        with contextlib.suppress(OSError, ValueError):  # a cache: where it can not be written, the next one builds
            _write(file, json.dumps({"shapes": shapes, "config": plain}, allow_nan=False))
    return Expected(shapes=shapes, config=plain)


def _file(config: Mapping[str, Any]) -> Path:
    from platformdirs import user_cache_path

    asked = {
        "config": {k: v for k, v in config.items() if k not in DROPPED_KEYS},
        "moepress": __version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return user_cache_path("moepress") / "tensors" / f"{digest}.json"


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


def _recall(file: Path) -> Expected | None:
    """What was remembered; None where there is nothing, or nothing sound."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        shapes = {str(name): tuple(map(int, shape)) for name, shape in found["shapes"].items()}
        return Expected(shapes=shapes, config=dict(found["config"]), remembered=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
