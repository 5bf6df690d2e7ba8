"""A recipe's YAML, as values that are not checked yet; imports nothing heavy."""

from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError
from moepress.models.storage.inside import require_own
from moepress.runs.files import read_text
from moepress.runs.parsing import parse_yaml
from moepress.runs.text import one_line


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
    return found
