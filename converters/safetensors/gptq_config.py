"""The `quantize_config.json` of a model in GPTQ layout, which is its `quantization_config` too: written and read.

Source: GPTQModel 7.7.0 `QuantizeConfig`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moepress import __version__
from moepress.converters.safetensors.compressed_tensors_config import Groups
from moepress.converters.safetensors.patterns import PREFIX
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme, is_group_size, is_one_of
from moepress.errors import InvalidInputError, UnsupportedError

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
NOT_QUANTIZED_PREFIX, OTHERWISE_PREFIX = "-:", "+:"
# Setting, what is read, what AutoGPTQ and GPTQModel assume when it is absent.
_RULES: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("quant_method", ("gptq",), "gptq"),
    ("checkpoint_format", ("gptq",), "gptq"),
    ("bits", SUPPORTED_BITS, None),
    ("sym", (True, False), True),
    ("desc_act", (False,), True),
    ("pack_dtype", ("int32",), "int32"),
    ("lm_head", (False,), False),
)


_OVERRIDES = {"bits": SUPPORTED_BITS, "sym": (True, False), "desc_act": (False,)}
"""What `dynamic` may set for some modules, besides their group size, and what is read of it."""


def quantize_config(
    scheme: Scheme, not_quantized: Sequence[str] = (), otherwise: Mapping[str, Scheme] | None = None
) -> dict[str, Any]:
    """The JSON of `quantize_config.json`, which is also the `quantization_config` of config.json.

    Args:
        scheme: bits and group size.
        not_quantized: regular expressions of module names that hold plain weights, matched from the name's start;
            `module_pattern` makes one of a name.
        otherwise: such expressions of modules that have another scheme.

    Returns:
        A JSON object.
    """
    config: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"moepress:{__version__}"]},
    }
    own = {
        OTHERWISE_PREFIX + pattern: {"bits": each.bits, "group_size": each.group_size}
        | ({} if each.symmetric == scheme.symmetric else {"sym": each.symmetric})
        for pattern, each in (otherwise or {}).items()
    }
    if not_quantized or own:
        config["dynamic"] = {NOT_QUANTIZED_PREFIX + pattern: {} for pattern in not_quantized} | own
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
        InvalidInputError, UnsupportedError: as `parse_groups`; also other bits for some modules.
    """
    groups, plain = parse_groups(config)
    if len(groups) > 1:
        raise UnsupportedError(
            f"quantize_config.dynamic gives {groups[0][0][0]!r} settings of its own, and one is wanted."
        )
    return groups[0][1], plain


def parse_groups(config: Mapping[str, Any]) -> tuple[Groups, tuple[str, ...]]:
    """The schemes of a folder whose `quantize_config.json` this is, with their modules, and its unquantized modules.

    Returns:
        Pairs of `re:` patterns and scheme, in order, the last for all other Linears; and the regular expressions of
        modules that hold plain weights.

    Raises:
        InvalidInputError: the group size is missing, or `dynamic` is no object.
        UnsupportedError: any setting under which the bytes mean something else (desc_act, the v2 format).
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
    base = Scheme(bits=config["bits"], group_size=group_size, symmetric=config.get("sym", True))
    own = list[tuple[tuple[str, ...], Scheme]]()
    for pattern, settings in dynamic.items():
        if not pattern.startswith(NOT_QUANTIZED_PREFIX):
            own.append(((PREFIX + pattern.removeprefix(OTHERWISE_PREFIX),), _otherwise(pattern, settings, base)))
    plain = [pattern for pattern in dynamic if pattern.startswith(NOT_QUANTIZED_PREFIX)]
    return (*own, (("Linear",), base)), tuple(pattern.removeprefix(NOT_QUANTIZED_PREFIX) for pattern in plain)


def _otherwise(pattern: str, settings: Any, base: Scheme) -> Scheme:
    """The scheme that `dynamic` gives some modules."""
    if not isinstance(settings, Mapping):
        raise InvalidInputError(f"quantize_config.dynamic gives {pattern!r} {settings!r}; it must be an object.")
    size = settings.get("group_size", base.group_size)
    read = all(
        key in _OVERRIDES and is_one_of(settings[key], _OVERRIDES[key]) for key in settings if key != "group_size"
    )
    if not read or not is_group_size(size):
        raise UnsupportedError(
            f"quantize_config.dynamic gives {pattern!r} settings that are not read here: {settings!r}."
        )
    bits, symmetric = settings.get("bits", base.bits), settings.get("sym", base.symmetric)
    return Scheme(bits=bits, group_size=size, symmetric=symmetric)
