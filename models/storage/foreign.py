"""Weights that are quantized, or stored in a way that is not read here: known by names, dtypes, config, sidecar files.

What a folder's tensors are counts for more than what its config states: a config may be left over (`settled`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moepress.errors import UnsupportedError
from moepress.models.storage.block_types import BLOCK_SUFFIXES
from moepress.models.storage.safetensors_file import Stored

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"
SCALE = "_scale_inv"
SIDECARS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json that state a quantization: of GPTQ and AWQ tools, of AutoAWQ, of NVIDIA's ModelOpt."""

BLOCKS_METHOD = "gguf-blocks"
"""`quant_method` of our folders whose matrices lie in GGUF's block types; no runtime knows it, so that each refuses."""
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVFP4 by NVIDIA ModelOpt",
    "nvfp4": "NVFP4",
    "quark": "AMD Quark",
    "hqq": "HQQ",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "fp8 by FBGEMM",
    "mlx": "MLX",
    BLOCKS_METHOD: "GGUF's blocks",
}
_Sign = Callable[[str, Stored, Mapping[str, Stored]], str | None]


def stated_method(config: Mapping[str, Any]) -> str | None:
    """The quantization that a config states, in people's words; None where it states none."""
    if isinstance(config.get("quantization"), dict):
        return "MLX"
    for key in ("quantization_config", "compression_config"):
        stated = config.get(key)
        if stated is None or stated == {}:
            continue
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        if isinstance(stated, dict) and "load_in_4bit" in stated and method is None:
            method = "bitsandbytes"
        return _METHODS.get(str(method), str(method)) if method else "unknown method"
    return None


def stated_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks of fp8 weights that a config states, or None."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8":
        return None
    block = stated.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return None


def stored_method(stored: Mapping[str, Stored]) -> tuple[str, Stored] | None:
    """The quantization that tensors show, and the first that shows it; None for plain and block-scaled fp8 weights."""
    for name, entry in stored.items():
        usual = name.endswith((".weight", ".bias", SCALE))  # nearly all of what may be a hundred thousand names
        if usual and entry.dtype in PLAIN_DTYPES:
            continue
        for sign in (_scaled,) if usual and entry.dtype == FP8 else _SIGNS:
            found = sign(name, entry, stored)
            if found:
                return found, entry
    return None


def refuse_foreign(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored], *, also_read: bool = False
) -> None:
    """Refuse what is stored in a form that is not read; what `packed` reads passes, but with `also_read`.

    Raises:
        UnsupportedError: naming the form, what shows it, and what to do.
    """
    found = stored_method(stored)
    if found is None:
        strange = [e for e in stored.values() if e.dtype not in (*PLAIN_DTYPES, FP8)]
        stated = stated_method(config)
        if not strange or stated in (None, "fp8"):
            return  # plain, or a tensor that is no weight, of which `checkpoint` speaks
        found = str(stated), strange[0]
    label, entry = found
    if label.startswith(READ) and not also_read:
        return
    if label == ONE_SCALE and stated_block(config) is not None:
        return  # a block's scales that do not fit, of which `checkpoint` speaks
    sidecar = next((name for name in SIDECARS if (folder / name).is_file()), None)
    only = f", with its settings only in {sidecar}" if sidecar and stated_method(config) is None else ""
    raise UnsupportedError(
        f"{folder} is already quantized or stored otherwise ({label}{only}: {entry.name} in {entry.file.name} is "
        f"{entry.dtype} {list(entry.shape)}); {_what_to_do(label, sidecar if only else None)}"
    )


def leftover_sidecars(folder: Path) -> tuple[str, ...]:
    """What is to be said of files that state a quantization beside weights that have none."""
    return tuple(
        f"{name} states a quantization that the weights do not have; outputs are without it."
        for name in SIDECARS
        if (folder / name).is_file()
    )


def _what_to_do(label: str, sidecar: str | None) -> str:
    if label == FUSED_FP8:
        return (
            "save it again with one tensor per expert (transformers' save_pretrained does by default, without "
            "save_original_format=False), or start from the original folder."
        )
    if label == E8M0:
        return "store the scales as F32 (2 to the power of the byte less 127), or start from the bf16 weights."
    start = "start from the model that it was made from, in bf16, fp16, fp32 or block-scaled fp8"
    if label in ("GPTQ", "AWQ") and sidecar:
        return (
            f"{start}. To run or export it as it is, copy the object in {sidecar} into config.json as "
            "`quantization_config`."
        )
    return f"{start}."


READ = (
    *("GPTQ", "AWQ", "MXFP4", "NVFP4", "compressed-tensors", "fp8", "block-scaled", "4 or 8 bits"),
    *("weights with F8_E8M0", "weights in F4", "GGUF's blocks"),
)
"""How labels begin of what `packed` reads."""
FUSED_FP8 = "fp8 with the experts of a layer fused in one tensor"
ONE_SCALE = "fp8 with one scale per tensor or row"
E8M0 = "block-scaled fp8 with F8_E8M0 scales"


def _codes(name: str, _entry: Stored, stored: Mapping[str, Stored]) -> str | None:
    """Codes in words, by their suffix: GPTQ has an order of columns, AWQ has none."""
    base = name.rpartition(".")[0]
    if name.endswith(".qweight"):
        return "GPTQ" if f"{base}.g_idx" in stored else "AWQ"
    if name.endswith((".weight_packed", ".weight_global_scale")):
        return "NVFP4 (compressed-tensors)" if f"{base}.weight_global_scale" in stored else "compressed-tensors"
    return None


def _by_name(name: str, _entry: Stored, _stored: Mapping[str, Stored]) -> str | None:
    for label, parts, suffixes in _NAMES:
        if name.endswith(suffixes) or any(part in name for part in parts):
            return label
    return None


_NAMES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("bitsandbytes", (".quant_state.", ".quant_map"), (".absmax", ".SCB")),
    ("NVFP4 by NVIDIA ModelOpt", (), (".weight_scale_2",)),
    ("HQQ", (), (".W_q",)),
    ("optimum-quanto", (), (".weight._data", ".weight._scale")),
    ("torchao", (), ("_weight_qdata", ":qdata", ".qdata")),
    ("ExLlamaV2", (), (".q_weight",)),
    ("ExLlamaV3", (), (".trellis",)),
)


def _blocks(name: str, entry: Stored, stored: Mapping[str, Stored]) -> str | None:
    if name.endswith("_blocks") and entry.dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in stored:
        return "MXFP4"
    if entry.dtype == "U8" and name.endswith(tuple(BLOCK_SUFFIXES)):
        return "GGUF's blocks"
    if name.endswith(".weight") and entry.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in stored:
        return "MLX"
    return None


def _scaled(name: str, entry: Stored, stored: Mapping[str, Stored]) -> str | None:
    """Eight bits with scales that are not those of DeepSeek's blocks."""
    if entry.dtype == "F8_E8M0":
        return E8M0 if name.endswith(SCALE) else "weights with F8_E8M0 scales, as of MXFP4 or MXFP8"
    if entry.dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        return f"weights in {entry.dtype}"
    scale = stored.get(f"{name}_scale")
    if entry.dtype in (FP8, "F8_E5M2", "I8", "U8") and scale is not None:
        kind = {"I8": "int8", "U8": "4 or 8 bits in bytes"}.get(entry.dtype, "fp8")
        return f"{kind} with {'one scale per tensor' if not scale.shape else 'scales in weight_scale'}"
    own = stored.get(f"{name}{SCALE}")
    if entry.dtype == FP8 and len(entry.shape) == 3:
        return FUSED_FP8
    if entry.dtype == FP8 and own is not None and len(own.shape) < 2:
        return ONE_SCALE
    return None


_SIGNS: tuple[_Sign, ...] = (_codes, _by_name, _blocks, _scaled)
