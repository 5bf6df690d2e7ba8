"""The tensors that transformers' model of a config has: asked of the model once, then remembered in the user's cache.

Building the model on the meta device imports torch and the model's code, seconds in all; what comes of it are names,
shapes and numbers. They depend on the config and on transformers' version alone, which are the key that they are kept
under. Who refuses a folder does so by the model itself, not from memory (`completeness`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepress.models.families import remembered


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
    found = _recall(config)
    return built(config) if found is None else found


def built(config: Mapping[str, Any]) -> Expected:
    """Of transformers' model, whatever is remembered.

    Raises:
        InvalidInputError: the numbers in the config do not make a model.
    """
    from moepress.models.families.skeleton import build_skeleton

    return remember(config, build_skeleton(config))


def remember(config: Mapping[str, Any], model: Any) -> Expected:
    """Of a model that somebody has built of that config, for the next process to recall."""
    from moepress.models.families.skeleton import head_of

    plain = {
        k: v
        for k, v in vars(model.config.get_text_config()).items()
        if v is None or isinstance(v, bool | int | float | str)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = head_of(model)
    plain["tied_head"] = head is not None and head.weight is model.get_input_embeddings().weight
    remembered.keep(remembered.place_of("tensors", config), {"shapes": shapes, "config": plain})
    return Expected(shapes=shapes, config=plain)


def _recall(config: Mapping[str, Any]) -> Expected | None:
    """What was remembered; None where there is nothing, or nothing sound."""
    found = remembered.recall(remembered.place_of("tensors", config))
    try:
        shapes = {str(name): tuple(map(int, shape)) for name, shape in (found or {})["shapes"].items()}
        return Expected(shapes=shapes, config=dict((found or {})["config"]), remembered=True)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
