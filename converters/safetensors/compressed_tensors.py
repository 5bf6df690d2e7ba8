"""The compressed-tensors `pack-quantized` layout: the tensors of one matrix, and the `quantization_config` of a model.

| tensor | dtype | shape | content |
|---|---|---|---|
| `.weight_packed` | int32 | (out, ceil(in * bits / 32)) | q + 2**(bits-1) along in, least significant bits first |
| `.weight_scale` | the model's | (out, groups) | weight = q * scale |
| `.weight_shape` | int64 | (2,) | [out, in] |

Letters: O out, I in, G groups. Source: compressed-tensors 0.20 `PackedQuantizationCompressor`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moepress.converters.safetensors.packing import pack_compressed, unpack_compressed
from moepress.converters.safetensors.scheme import PER_CHANNEL, SUPPORTED_BITS, Scheme
from moepress.errors import InvalidInputError, UnsupportedError

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
IGNORE_REGEX_PREFIX = "re:"
SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape")

# What a matrix has beside those three when it is quantized in a way that we do not read.
_FOREIGN_SUFFIXES = {
    ".weight_zero_point": "asymmetric codes",
    ".weight_g_idx": "columns grouped out of order (actorder group)",
    ".weight_global_scale": "a two-level scale",
}

# Setting, what is read, what is assumed when it is absent.
_Rules = tuple[tuple[str, tuple[Any, ...], Any], ...]
_MODEL_RULES: _Rules = (
    ("quant_method", (QUANT_METHOD,), QUANT_METHOD),
    ("format", (FORMAT,), "fakequant"),
    ("quantization_status", ("compressed",), "initialized"),
    ("kv_cache_scheme", (None,), None),
    ("sparsity_config", (None, {}), None),
    ("transform_config", (None, {}), None),
)
_GROUP_RULES: _Rules = (
    ("targets", (["Linear"],), None),
    ("format", (None, FORMAT), None),
    ("input_activations", (None,), None),
    ("output_activations", (None,), None),
)
_WEIGHT_RULES: _Rules = (
    ("num_bits", SUPPORTED_BITS, 8),
    ("type", ("int",), "int"),
    ("symmetric", (True,), True),
    ("dynamic", (False,), False),
    ("strategy", ("group", "channel"), None),
    ("actorder", (None, False, "static", "weight"), None),
    ("block_structure", (None,), None),
)


def layer_tensors(
    module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that stand for one quantized Linear.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        codes: int8 [O, I].
        scales: floating [O, G], each value representable in `scale_dtype`: the solver must have rounded them before it
            chose the codes.
        scheme: bits and group size.
        scale_dtype: dtype of the stored scales, the model's.

    Returns:
        `.weight_packed`, `.weight_scale` and `.weight_shape` under the module's name.

    Raises:
        ValueError: shapes disagree with the scheme, a code is out of range, or a scale is not representable.
    """
    check_layer(module_name, codes, scales, scheme)
    stored_scales = scales.to(scale_dtype)
    if not torch.equal(stored_scales.to(scales.dtype), scales):
        raise ValueError(f"{module_name}: scales are not exact in {scale_dtype}; round them before choosing the codes")
    return {
        f"{module_name}.weight_packed": pack_compressed(codes, scheme.bits),
        f"{module_name}.weight_scale": stored_scales.contiguous(),
        f"{module_name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def read_layer(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of one quantized Linear; the inverse of `layer_tensors`.

    The bits must be told: a row of few columns has the same number of words at several widths.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        tensors: at least the three tensors of that module, under their full names.
        scheme: bits and group size, from `parse_config`.

    Returns:
        codes int8 [O, I] and scales [O, G] in their stored dtype.

    Raises:
        InvalidInputError: a tensor is missing, or its shape or dtype is not what `.weight_shape` says.
        UnsupportedError: the matrix has zero points or an activation order.
    """
    for suffix, meaning in _FOREIGN_SUFFIXES.items():
        if module_name + suffix in tensors:
            raise UnsupportedError(f"{module_name}{suffix} means {meaning}, which moepress does not read.")
    missing = [module_name + suffix for suffix in SUFFIXES if module_name + suffix not in tensors]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing from the checkpoint; download or write it again.")
    packed, scales, shape = (tensors[module_name + suffix] for suffix in SUFFIXES)
    out_features, in_features = (int(size) for size in shape.tolist())
    want_scales = (out_features, scheme.groups(in_features))
    if packed.shape[0] != out_features or tuple(scales.shape) != want_scales:
        raise InvalidInputError(
            f"{module_name}: weight_shape says {out_features} x {in_features}, but {packed.shape[0]} rows are packed "
            f"and the scales are {tuple(scales.shape)}, want {want_scales}; the files are not of one model."
        )
    return unpack_compressed(packed, scheme.bits, in_features), scales


Groups = tuple[tuple[tuple[str, ...], Scheme], ...]
"""Targets (module names, `re:` patterns, or `Linear` for all) and the scheme of the modules that they mean."""


def quantization_config(scheme: Scheme, ignore: Sequence[str], mixed: Groups = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    `actorder: static` tells readers that the columns may have been solved in another order, and that groups are in
    the order of the columns; it goes with groups only.

    Args:
        scheme: bits and group size; group size -1 becomes the strategy `channel`.
        ignore: names of the Linears (and routers) that are not quantized, as in the checkpoint, or `re:` patterns.
        mixed: several widths, each with the modules that have it, in place of `scheme` for all Linears.

    Returns:
        A JSON object that `compressed_tensors.QuantizationConfig` accepts.
    """
    groups = mixed or ((("Linear",), scheme),)
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {f"group_{n}": _config_group(*group) for n, group in enumerate(groups)},
    }


def _config_group(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False}
    if scheme.group_size == PER_CHANNEL:
        weights |= {"strategy": "channel"}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size, "actorder": "static"}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def parse_config(config: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of a folder whose `quantization_config` this is, and the modules it leaves alone.

    Args:
        config: the JSON object.

    Returns:
        The scheme, and the ignore list (names and `re:` patterns).

    Raises:
        InvalidInputError: a part is missing or not an object.
        UnsupportedError: asymmetric codes, several groups, another format, quantized activations, or any other
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
    found = tuple(
        _group(f"quantization_config.config_groups.{n}", g, alone=len(groups) == 1) for n, g in groups.items()
    )
    targets = [target for own, _scheme in found for target in own]
    if len(set(targets)) < len(targets):
        raise UnsupportedError(
            f"quantization_config has {len(groups)} config groups for the same modules; not read here."
        )
    return found, tuple(config.get("ignore") or ())


def _group(where: str, group: Any, *, alone: bool) -> tuple[tuple[str, ...], Scheme]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedError(f"{where} does not spell out its weights' settings (a preset?); moepress needs them.")
    _check_rules(where, group, _GROUP_RULES[1:] if not alone else _GROUP_RULES)
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise InvalidInputError(f"{where}.targets is {targets!r}; it must be a list of names or patterns.")
    weights = group["weights"]
    _check_rules(f"{where}.weights", weights, _WEIGHT_RULES)
    group_size = weights.get("group_size")
    if weights["strategy"] == "channel":
        group_size = PER_CHANNEL
    elif not isinstance(group_size, int):
        raise InvalidInputError(f"{where}.weights.group_size is {group_size!r}; the strategy `group` needs a number.")
    return tuple(targets), Scheme(bits=weights.get("num_bits", 8), group_size=group_size)


def scheme_for(module_name: str, groups: Groups) -> Scheme:
    """The scheme of a module: the first group that names it or has a pattern for it, else the one for all Linears.

    Raises:
        InvalidInputError: no group is for it, or a pattern is no regular expression.
    """
    for targets, scheme in groups:
        for target in targets:
            if target == module_name or (
                target.startswith(IGNORE_REGEX_PREFIX)
                and _matches(target.removeprefix(IGNORE_REGEX_PREFIX), module_name)
            ):
                return scheme
    for targets, scheme in groups:
        if "Linear" in targets:
            return scheme
    raise InvalidInputError(f"config.json says nothing of how {module_name} is quantized; restore it.")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise InvalidInputError(
            f"config.json holds the pattern {pattern!r}, which is none ({error}); mend it."
        ) from error


def check_layer(module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme) -> None:
    """Shapes that belong together: one scale per output row and group.

    Raises:
        ValueError: they do not.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"{module_name}: codes are {codes.dtype} {tuple(codes.shape)}, want int8 [out, in]")
    want = (codes.shape[0], scheme.groups(codes.shape[1]))
    if tuple(scales.shape) != want or not scales.is_floating_point():
        raise ValueError(f"{module_name}: scales are {scales.dtype} {tuple(scales.shape)}, want floating {want}")


def _check_rules(where: str, settings: Mapping[str, Any], rules: _Rules) -> None:
    """Refuse the first setting whose value is not one that we read."""
    for key, accepted, default in rules:
        value = settings.get(key, default)
        if value not in accepted:
            reads = " or ".join("nothing" if choice is None else repr(choice) for choice in accepted)
            raise UnsupportedError(f"{where}.{key} is {value!r}; moepress reads {reads}.")
