"""A config as transformers reads it: what it takes for the keys that config.json does not state."""

import copy
from collections.abc import Mapping
from typing import Any

from moepress.errors import InvalidInputError
from moepress.runs.text import one_line

# A classifier's labels: transformers makes a dictionary of `num_labels` entries, whatever that number is.
# A dtype is no part of what a model is, and some spellings of it are errors of torch.
DROPPED_KEYS = {"quantization_config", "auto_map", "num_labels", "id2label", "label2id", "dtype", "torch_dtype"}


ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that their authors' own code is for -> the one of transformers that is the same."""


def hf_config(config: Mapping[str, Any]) -> Any:
    """A transformers config object, without any quantization and without code from the checkpoint.

    Raises:
        InvalidInputError: transformers refuses the config.
    """
    from transformers import CONFIG_MAPPING

    # A copy in depth: transformers writes its own keys into rope_scaling; fingerprints and pruned configs are of ours.
    plain = _decoded(copy.deepcopy({k: v for k, v in config.items() if k not in DROPPED_KEYS}))
    try:
        name = config["model_type"]
        if name in ALIASES:
            plain["model_type"] = name = ALIASES[name]
        return CONFIG_MAPPING[name].from_dict(plain)
    except Exception as error:  # transformers validates with many exception types
        raise InvalidInputError(f"config.json is not valid for {config['model_type']}: {one_line(error)}") from error


def _decoded(value: Any) -> Any:
    """Numbers that JSON does not have, as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: _decoded(item) for key, item in value.items()}
