"""The `quantize_config.json` of a model in GPTQ layout, which is its `quantization_config` too: written and read.

Source: GPTQModel 7.7.0 `QuantizeConfig`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moepress import __version__
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme, is_group_size, is_one_of
from moepress.errors import InvalidInputError, UnsupportedError

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
NOT_QUANTIZED_PREFIX = "-:"
# Setting, what is read, what AutoGPTQ and GPTQModel assume when it is absent.
_RULES: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("quant_method", ("gptq",), "gptq"),
    ("checkpoint_format", ("gptq",), "gptq"),
    ("bits", SUPPORTED_BITS, None),
    ("sym", (True,), True),
    ("desc_act", (False,), True),
    ("pack_dtype", ("int32",), "int32"),
    ("lm_head", (False,), False),
)


def quantize_config(scheme: Scheme, not_quantized: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON of `quantize_config.json`, which is also the `quantization_config` of config.json.

    Args:
        scheme: bits and group size.
        not_quantized: regular expressions of module names that hold plain weights, matched from the name's start;
            `module_pattern` makes one of a name.

    Returns:
        A JSON object.
    """
    config: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"moepress:{__version__}"]},
    }
    if not_quantized:
        config["dynamic"] = {NOT_QUANTIZED_PREFIX + pattern: {} for pattern in not_quantized}
    return config


def module_pattern(module_name: str) -> str:
    """The regular expression that matches this module's name and no other."""
    return f"^{re.escape(module_name)}$"


def parse_config(config: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of a folder whose `quantize_config.json` this is, and its unquantized modules.

    Args:
        config: the JSON object.

    Returns:
        The scheme, and the regular expressions of modules that hold plain weights.

    Raises:
        InvalidInputError: the group size is missing, or `dynamic` is no object.
        UnsupportedError: any setting under which the bytes mean something else (asymmetric, desc_act, the v2 format,
            other bits for some modules).
    """
    for key, accepted, default in _RULES:
        value = config.get(key, default)
        if not is_one_of(value, accepted):
            reads = " or ".join(map(repr, accepted))
            raise UnsupportedError(f"quantize_config.{key} is {value!r}; moepress reads {reads}.")
    group_size: Any = config.get("group_size")
    if not is_group_size(group_size):
        raise InvalidInputError(f"quantize_config.group_size is {group_size!r}; it must be -1 or a multiple of 8.")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InvalidInputError(f"quantize_config.dynamic is {dynamic!r}; it must give settings by pattern.")
    overrides = [pattern for pattern in dynamic if not pattern.startswith(NOT_QUANTIZED_PREFIX)]
    if overrides:
        raise UnsupportedError(f"quantize_config.dynamic gives {overrides[0]!r} settings of its own; not read here.")
    return Scheme(bits=config["bits"], group_size=group_size), tuple(
        pattern.removeprefix(NOT_QUANTIZED_PREFIX) for pattern in dynamic
    )
