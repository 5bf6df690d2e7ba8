"""A recipe's YAML, as values that are not checked yet; imports nothing heavy."""

from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError
from moepress.models.storage.inside import require_own
from moepress.runs.files import read_text
from moepress.runs.parsing import parse_yaml
from moepress.runs.text import one_line
from moepress.validation.tasks.names import is_place


def load_recipe(file: Path) -> dict[str, Any]:
    """The values of a YAML recipe, not yet checked together with the command line's.

    Raises:
        InvalidInputError: it cannot be read or is not a mapping.
    """
    try:
        require_own(file)
        found = parse_yaml(read_text(file))
    except (OSError, ValueError) as error:  # text that is no UTF-8 is a ValueError
        why = one_line(error)
        raise InvalidInputError(f"{file} is not a readable YAML recipe ({why}).") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{file} does not hold a YAML mapping; take OUT/recipe.yaml of a run as a pattern.")
    return {key: _near(value, file.parent) if key in _PLACES else value for key, value in found.items()} | _tasks(
        found, file.parent
    )


_PLACES = ("model", "calibration", "domain", "data", "data_domain", "prompts", "targets_file")


def _tasks(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Task files beside the recipe; names of tasks stay, whatever lies there."""
    named = found.get("tasks")
    if not isinstance(named, list):
        return {}
    return {"tasks": [_near(one, folder) if isinstance(one, str) and is_place(one) else one for one in named]}


def _near(value: Any, folder: Path) -> Any:
    """Relative paths that are there beside the recipe, as they are from here; others, and what is none, stay."""
    if isinstance(value, list):
        return [_near(each, folder) for each in value]
    if not isinstance(value, str) or not value or value == "demo" or "\x00" in value or len(value) > 4096:
        return value
    name, equals, place = value.partition("=") if "=" in value else ("", "", value)
    beside = folder / place
    try:
        there = bool(place) and not Path(place).is_absolute() and beside.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    return f"{name}{equals}{beside}" if there else value
