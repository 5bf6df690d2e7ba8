"""What changed between two runs' settings, said as the user typed it: `--bits was 4, now 3`."""

import json
from collections.abc import Mapping
from typing import Any

from moepress.runs.byte_sizes import size_text

_LONGEST = 80
_OTHER = {  # settings whose values are digests, or long, or follow from other things
    "model": "the model is another one, or its files changed",
    "artifact": "the model is another one, or its files changed",
    "corpus": "the calibration text is another one (--calibration, --domain, --tokens, --window or --seed)",
    "keep": "the plan keeps other experts",
    "layer_bits": "the plan has other bits by layer",
    "repair": "--repair, or what was repaired, is another one",
    "piece_bytes": "the size of pieces is another one; go on with the version of moepress that began",
    "command": "it was made by another command",
}
_FLAGS = {  # setting: the flag, and its value where the flag is given
    "leave_one_out": ("--no-loo", False),
    "bit_losses": ("--no-bit-losses", False),
    "allow_nonfinite": ("--allow-nonfinite", True),
    "mixed_bits": ("--mixed-bits", True),
}
_NAMES = {
    "target": "--to",
    "memory_bytes": "--max-memory",
    "kernel": "--experts",
    "moepress": "the version of moepress",
    "torch": "the version of torch",
    "batch_windows": "the number of windows at once (it follows from --max-memory)",
    "scheme.codes": "--scheme",
    "hessian.asymmetry": "--match (auto follows --bits)",
    "hessian.independent": "--independent-layers",
    "hessian.end_tokens": "--effort (tokens of the backward pass)",
    "hessian.end_marks": "what ends answers (its tokens follow from --end-weight and the model's folder)",
    "solver.refits": "--effort (how often scales are refitted)",
    "solver.annealed": "--effort (annealed sweeps)",
    "part_bits": "the bits of parts (--bits)",
    "schema_version": "the recipe's schema_version",
    "recipe.model": "MODEL",
    "recipe.target": "--target",
}
_SIZES = ("memory_bytes", "max_memory", "budget")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One clause for each setting that differs, in the order of their names; last what follows from others."""
    said = [
        _clause(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key in ("batch_windows", "hessian"), key))
        if before.get(key) != now.get(key)
    ]
    return list(dict.fromkeys(clause for clauses in said for clause in clauses))


def _clause(key: str, before: Any, now: Any) -> list[str]:
    name = key.removeprefix("recipe.")
    if key in _OTHER and not (key == "keep" and isinstance(now, int | float)):
        return [_OTHER[key]]
    if name in _FLAGS:
        flag, given = _FLAGS[name]
        return [f"{flag} was {_whether(before == given)}, now {_whether(now == given)}"]
    if isinstance(before, dict) and isinstance(now, dict) and name in ("scheme", "hessian", "solver"):
        parts = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        return [_of_group(name, part, before.get(part), now.get(part)) for part in parts]
    return [_was(_NAMES.get(key) or _NAMES.get(name) or _option(name), name, before, now)]


def _of_group(group: str, part: str, before: Any, now: Any) -> str:
    if (group, part) == ("hessian", "asymmetry"):
        before, now = ("original" if value else "own" for value in (before, now))
    return _was(_NAMES.get(f"{group}.{part}") or _option(part), part, before, now)


def _was(what: str, name: str, before: Any, now: Any) -> str:
    return f"{what} was {_value(name, before)}, now {_value(name, now)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _whether(given: bool) -> str:
    return "given" if given else "not given"


def _value(name: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "not given"
    if name in _SIZES and isinstance(value, int):
        return size_text(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
