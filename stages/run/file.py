"""A recipe's YAML, as values that are not checked yet; imports nothing heavy."""

from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError


def load_recipe(file: Path) -> dict[str, Any]:
    """The values of a YAML recipe, not yet checked together with the command line's.

    Raises:
        InvalidInputError: it cannot be read or is not a mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InvalidInputError(f"{file} is not a readable YAML recipe ({why}).") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{file} does not hold a YAML mapping; take OUT/recipe.yaml of a run as a pattern.")
    return found
