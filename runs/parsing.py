"""JSON and YAML from files that may be anything: bounded in depth, digits and references, and never more than data.

Python's own reader follows any depth until its stack ends, and an integer of ten thousand digits costs more than the
index of a whole model. What is beyond these bounds is a ValueError, like text that is no JSON at all.
"""

import json
from collections.abc import Callable
from typing import Any

DEEPEST = 100
MOST_DIGITS = 40
_YAML_BYTES = 1 << 20


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Plain JSON.

    Args:
        text: of the file.
        pairs: makes an object of its pairs; None for a dict.

    Raises:
        ValueError: it is none, is nested too deeply, or holds an integer of too many digits.
    """
    _bound_depth(text)
    return json.loads(text, parse_int=_integer, object_pairs_hook=pairs)


def _bound_depth(text: str) -> None:
    """Count brackets outside of strings; quick for the usual text, which has few in all."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth, within, escaped = 0, False, False
    for character in text:
        if within:
            within = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            within = True
        elif character in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        elif character in "]}":
            depth -= 1


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


def _is_long_number(text: str) -> bool:
    plain = text.lstrip("+-").replace("_", "").lower()
    return len(plain) > MOST_DIGITS and all(c in "0123456789abcdefox.:" for c in plain)


def parse_yaml(text: str) -> Any:
    """Plain YAML: no tags that make objects, no anchors and aliases (a few lines of them stand for gigabytes).

    Raises:
        ValueError: it is none, is too large or too deep, or holds what is not plain.
    """
    import yaml

    if len(text) > _YAML_BYTES:
        raise ValueError(f"it has more than {_YAML_BYTES:,} characters")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError("it holds anchors or aliases; write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
            if isinstance(event, yaml.ScalarEvent) and _is_long_number(event.value):
                raise ValueError(f"it holds a number of more than {MOST_DIGITS} digits")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
