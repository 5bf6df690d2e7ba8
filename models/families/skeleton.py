"""transformers' own model for a config, on the meta device: the truth about names, shapes and the forward pass."""

import warnings
from collections.abc import Mapping
from typing import Any

from moepress.errors import InvalidInputError
from moepress.models.families.attention import register
from moepress.models.families.hf_config import hf_config
from moepress.models.families.mostly_meta import MostlyMeta
from moepress.runs.text import one_line

_TOWERS = ("vision_config", "audio_config", "vit_config")


def build_skeleton(config: Mapping[str, Any], *, attention: str | None = None) -> Any:
    """The language model of that config, with the towers that it has, and all weights on the meta device.

    Args:
        config: config.json.
        attention: transformers' `attn_implementation`; None for ours, which is its `sdpa` made fast for MLA, or eager
            attention where the model knows no other (such as those with attention sinks).

    Raises:
        InvalidInputError: the numbers in the config do not make a model.
    """
    parsed = hf_config(config)
    auto = auto_class(parsed)
    wanted = _implementation(auto, parsed, attention)
    try:
        try:
            return _built(auto, parsed, wanted)
        except KeyError as error:
            if error.args != (wanted,):
                raise
            return _built(auto, parsed, "sdpa")  # a tower with a table of its own, which knows no other names
    except Exception as error:
        raise InvalidInputError(f"config.json describes no model that can be built: {one_line(error)}") from error


def _built(auto: Any, parsed: Any, attention: str) -> Any:
    with MostlyMeta(), warnings.catch_warnings():
        # torch says of a shared expert of width 0 that there is nothing to initialize; nothing is, on this device.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return auto.from_config(parsed, dtype="float32", attn_implementation=attention).eval()


def head_of(model: Any) -> Any:
    """The module that makes logits: what the model says it is, else the one of that name (a composite may say none).

    None where a model has neither.
    """
    said = model.get_output_embeddings()
    if said is not None:
        return said
    return next((module for name, module in model.named_modules() if name.endswith("lm_head")), None)


def auto_class(parsed: Any) -> Any:
    """transformers' auto class for a config: with its towers where the config has some, else the language model alone.

    Args:
        parsed: as transformers parsed it.

    Raises:
        InvalidInputError: transformers has no model for it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    composite = any(getattr(parsed, key, None) is not None for key in _TOWERS)
    wide = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    order = (*wide, AutoModelForCausalLM) if composite else (AutoModelForCausalLM, *wide)
    for auto in order:
        if type(parsed) in auto._model_mapping:
            return auto
    raise InvalidInputError(
        f"transformers has no language model for model type {parsed.model_type}; take config.json from the original "
        "folder."
    )


def _implementation(auto: Any, parsed: Any, attention: str | None) -> str:
    wanted = attention or register()
    found = auto._model_mapping[type(parsed)]
    classes = found if isinstance(found, list | tuple) else (found,)
    return wanted if all(one._supports_sdpa for one in classes) else "eager"
