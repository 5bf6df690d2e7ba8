"""transformers' own model for a config, on the meta device: the truth about names, shapes and the forward pass."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from moepress.errors import InvalidInputError
from moepress.models.families.hf_config import hf_config
from moepress.models.forward.attention import register
from moepress.runs.text import one_line


def build_skeleton(config: Mapping[str, Any], *, attention: str | None = None) -> Any:
    """The causal language model of that config with all weights on the meta device.

    Args:
        config: config.json.
        attention: transformers' `attn_implementation`; None for ours, which is its `sdpa` made fast for MLA.

    Raises:
        InvalidInputError: the numbers in the config do not make a model.
    """
    from transformers import AutoModelForCausalLM

    parsed, implementation = hf_config(config), attention or register()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # torch says of a shared expert of width 0 that there is nothing to initialize; nothing is, on this device.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation=implementation)
    except Exception as error:
        raise InvalidInputError(f"config.json describes no model that can be built: {one_line(error)}") from error
    return model.eval()
