"""The `quantization_config` of a model in compressed-tensors layout: written, and read with every setting checked.

Source: compressed-tensors 0.20 `QuantizationConfig`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.converters.safetensors.patterns import matches
from moepress.converters.safetensors.scheme import (
    FLOAT_GROUPS,
    PER_CHANNEL,
    SUPPORTED_BITS,
    Codes,
    Scheme,
    is_group_size,
    is_one_of,
)
from moepress.errors import InvalidInputError, UnsupportedError

QUANT_METHOD = "compressed-tensors"
FORMATS = {
    Codes.INT: "pack-quantized",
    Codes.NVFP4: "nvfp4-pack-quantized",
    Codes.MXFP4: "mxfp4-pack-quantized",
}
SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape")
FLOAT_SUFFIXES = {
    Codes.NVFP4: (".weight_packed", ".weight_scale", ".weight_global_scale"),
    Codes.MXFP4: (".weight_packed", ".weight_scale"),
}
ZERO_SUFFIX = ".weight_zero_point"
"""What a matrix of asymmetric codes has besides."""


def parts_of(codes: Codes) -> tuple[str, ...]:
    """Suffixes of the tensors that stand for one matrix."""
    return FLOAT_SUFFIXES.get(codes, SUFFIXES)


# Setting, what is read, what is assumed when it is absent.
_Rules = tuple[tuple[str, tuple[Any, ...], Any], ...]
_MODEL_RULES: _Rules = (
    ("quant_method", (QUANT_METHOD,), QUANT_METHOD),
    ("format", tuple(FORMATS.values()), "fakequant"),
    ("quantization_status", ("compressed",), "initialized"),
    ("kv_cache_scheme", (None,), None),
    ("sparsity_config", (None, {}), None),
    ("transform_config", (None, {}), None),
)
_GROUP_RULES: _Rules = (
    ("targets", (["Linear"],), None),
    ("input_activations", (None,), None),
    ("output_activations", (None,), None),
)
_ANY_WEIGHT_RULES: _Rules = (
    ("dynamic", (False,), False),
    ("block_structure", (None,), None),
)
_WEIGHT_RULES: _Rules = (
    ("num_bits", SUPPORTED_BITS, 8),
    ("type", ("int",), "int"),
    ("symmetric", (True, False), True),
    ("strategy", ("group", "channel"), None),
    ("actorder", (None, False, "static", "weight"), None),
    *_ANY_WEIGHT_RULES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Floats:
    """How a format of 4-bit floats is stated: the strategy, and the dtype of its scales."""

    strategy: str
    scale_dtype: str

    def rules(self, codes: Codes) -> _Rules:
        """What is read."""
        return (
            ("num_bits", (4,), 8),
            ("type", ("float",), "int"),
            ("symmetric", (True,), True),
            ("strategy", (self.strategy,), None),
            ("group_size", (FLOAT_GROUPS[codes],), None),
            ("scale_dtype", (None, self.scale_dtype), None),
            ("actorder", (None, False), None),
            *_ANY_WEIGHT_RULES,
        )


_FLOATS = {
    Codes.NVFP4: _Floats(strategy="tensor_group", scale_dtype="torch.float8_e4m3fn"),
    Codes.MXFP4: _Floats(strategy="group", scale_dtype="torch.uint8"),
}
Groups = tuple[tuple[tuple[str, ...], Scheme], ...]
"""Targets (module names, `re:` patterns, or `Linear` for all) and the scheme of the modules that they mean."""


def quantization_config(scheme: Scheme, ignore: Sequence[str], mixed: Groups = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    `actorder: static` tells readers that the columns may have been solved in another order, and that groups are in
    the order of the columns; it goes with groups only.

    Args:
        scheme: bits, group size and what codes are; group size -1 becomes the strategy `channel`.
        ignore: names of the Linears (and routers) that are not quantized, as in the checkpoint, or `re:` patterns.
        mixed: several widths, each with the modules that have it, in place of `scheme` for all Linears.

    Returns:
        A JSON object that `compressed_tensors.QuantizationConfig` accepts.
    """
    groups = mixed or ((("Linear",), scheme),)
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMATS[scheme.codes],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {f"group_{n}": _config_group(*group) for n, group in enumerate(groups)},
    }


def _config_group(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    if scheme.floats:
        stated = _FLOATS[scheme.codes]
        weights |= {"type": "float", "strategy": stated.strategy, "group_size": scheme.group_size}
        weights |= {"scale_dtype": stated.scale_dtype, "zp_dtype": stated.scale_dtype}
    elif scheme.group_size == PER_CHANNEL:
        weights |= {"strategy": "channel"}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size, "actorder": "static"}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMATS[scheme.codes],
    }


def parse_config(config: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of a folder whose `quantization_config` this is, and the modules it leaves alone.

    Args:
        config: the JSON object.

    Returns:
        The scheme, and the ignore list (names and `re:` patterns).

    Raises:
        InvalidInputError: a part is missing or not an object.
        UnsupportedError: several groups, another format, quantized activations, or any other
            setting under which the bytes mean something else.
    """
    groups, ignore = parse_groups(config)
    if len(groups) > 1:
        raise UnsupportedError(f"quantization_config has {len(groups)} config groups: mixed bits, where one is wanted.")
    return groups[0][1], ignore


def parse_groups(config: Mapping[str, Any]) -> tuple[Groups, tuple[str, ...]]:
    """All groups of a `quantization_config`: mixed bits have several, each with the modules it is for.

    Returns:
        Pairs of targets (module names, `re:` patterns, or `Linear` for all) and scheme, in order, and the ignore list.

    Raises:
        InvalidInputError, UnsupportedError: as `parse_config`; also two groups for the same target.
    """
    _check_rules("quantization_config", config, _MODEL_RULES)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InvalidInputError(
            "quantization_config.config_groups is missing; config.json does not describe the codes."
        )
    codes = stated_codes(config)
    found = tuple(
        _group(f"quantization_config.config_groups.{n}", g, codes, alone=len(groups) == 1) for n, g in groups.items()
    )
    targets = [target for own, _scheme in found for target in own]
    if len(set(targets)) < len(targets):
        raise UnsupportedError(
            f"quantization_config has {len(groups)} config groups for the same modules; not read here."
        )
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise InvalidInputError(f"quantization_config.ignore is {ignore!r}; it must be a list of names or patterns.")
    return found, tuple(ignore)


def stated_codes(config: Mapping[str, Any]) -> Codes:
    """What codes are by the format that a `quantization_config` states; integers where it states none of ours."""
    return next((codes for codes, name in FORMATS.items() if name == config.get("format")), Codes.INT)


def _group(where: str, group: Any, codes: Codes, *, alone: bool) -> tuple[tuple[str, ...], Scheme]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedError(f"{where} does not spell out its weights' settings (a preset?); moepress needs them.")
    of_format: _Rules = (("format", (None, FORMATS[codes]), None),)
    _check_rules(where, group, of_format + (_GROUP_RULES[1:] if not alone else _GROUP_RULES))
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise InvalidInputError(f"{where}.targets is {targets!r}; it must be a list of names or patterns.")
    weights = group["weights"]
    if codes in _FLOATS:
        _check_rules(f"{where}.weights", weights, _FLOATS[codes].rules(codes))
        return tuple(targets), Scheme.of_floats(codes)
    _check_rules(f"{where}.weights", weights, _WEIGHT_RULES)
    group_size = weights.get("group_size")
    if weights["strategy"] == "channel":
        group_size = PER_CHANNEL
    elif not is_group_size(group_size):
        raise InvalidInputError(
            f"{where}.weights.group_size is {group_size!r}; the strategy `group` needs a multiple of 8."
        )
    symmetric = weights.get("symmetric", True)
    return tuple(targets), Scheme(bits=weights.get("num_bits", 8), group_size=group_size, symmetric=symmetric)


def suffixes_of(scheme: Scheme) -> tuple[str, ...]:
    """The tensors of one matrix in that scheme, behind its module's name."""
    return parts_of(scheme.codes) if scheme.symmetric else (*SUFFIXES, ZERO_SUFFIX)


def scheme_for(module_name: str, groups: Groups) -> Scheme:
    """The scheme of a module: the first group that names it or has a pattern for it, else the one for all Linears.

    Raises:
        InvalidInputError: no group is for it, or a pattern is none that can be matched.
    """
    for targets, scheme in groups:
        for target in targets:
            if matches(target, module_name):
                return scheme
    for targets, scheme in groups:
        if "Linear" in targets:
            return scheme
    raise InvalidInputError(f"config.json says nothing of how {module_name} is quantized; restore it.")


def _check_rules(where: str, settings: Mapping[str, Any], rules: _Rules) -> None:
    """Refuse the first setting whose value is not one that we read."""
    for key, accepted, default in rules:
        value = settings.get(key, default)
        if not is_one_of(value, accepted):
            reads = " or ".join("nothing" if choice is None else repr(choice) for choice in accepted)
            raise UnsupportedError(f"{where}.{key} is {value!r}; moepress reads {reads}.")
