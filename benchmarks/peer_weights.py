"""Other tools' quantized folders as subjects of a measurement, and a second reading that holds ours to account."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from peers.read_gptq import codes_of, dequantize, matrices
from safetensors import safe_open

from moepress.compress.gptq.include import Include, quantized_linears
from moepress.converters.safetensors.artifact import Artifact, open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint

# With the routed experts: every Linear but routers, `lm_head` and what `quantize` never touches.
EVERYTHING = (Include.ATTENTION, Include.SHARED, Include.DENSE)
SAMPLED = 100  # matrices that are read to see whether they are the model's
# Twice what normal weights lose to rounding at 2 bits; a matrix that is not the model's differs by 1.4 of its size.
LARGEST_ERROR = 0.8


def open_exact(folder: Path) -> Artifact:
    """A quantized folder whose weights are codes times scales in fp32, whichever tool made it."""
    return replace(open_artifact(folder), exact=True)


def check_reading(artifact: Artifact) -> int:
    """Compare every quantized weight with an unpacking that shares no code with ours; returns how many there are.

    Raises:
        SystemExit: a weight differs, or one is read by one side only.
    """
    bits, count = artifact.scheme.bits, 0
    if artifact.scheme.floats:
        unpacked = _floats(artifact.folder)
    else:
        unpacked = _gptq(artifact.folder, bits) if artifact.layout == "gptq" else _compressed(artifact.folder, bits)
    for module, weight_OI in unpacked:
        if not torch.equal(artifact.read(f"{module}.weight"), weight_OI):
            raise SystemExit(f"{artifact.folder}: {module} is not its codes times its scales")
        count += 1
    known = sum(artifact.is_quantized(name) for name in artifact.shapes)
    if count != known:
        raise SystemExit(f"{artifact.folder}: {count} quantized matrices are stored, {known} are read")
    return count


def quantized_names(artifact: Artifact) -> set[str]:
    """Weights that are stored as codes."""
    return {name for name in artifact.shapes if artifact.is_quantized(name)}


def expected_names(base: Checkpoint) -> set[str]:
    """The weights that every tool is to quantize."""
    layers = base.shape.layers
    routed = {name for name in base.shapes if part_of(base.family, name, layers) is Part.ROUTED}
    return routed | quantized_linears(base, layers, EVERYTHING)


def require_quantized(folder: Path, model: Path, scheme: Scheme) -> dict[str, float]:
    """Make sure that a tool did all of the work, and did it to this model.

    Args:
        folder: what it wrote.
        model: the original.
        scheme: what was asked for.

    Returns:
        linears: how many matrices are quantized; weight_error: |W - Q| / |W|, the mean over some of them.

    Raises:
        SystemExit: other matrices, bits or groups, or weights that are far from the model's.
    """
    base, artifact = open_checkpoint(model), open_exact(folder)
    wanted, found = expected_names(base), quantized_names(artifact)
    if found != wanted:
        some = ", ".join(sorted(found ^ wanted)[:3])
        raise SystemExit(
            f"{folder}: {len(found)} matrices are quantized, {len(wanted)} were to be; not the same: {some}"
        )
    if (artifact.scheme.bits, artifact.scheme.group_size) != (scheme.bits, scheme.group_size):
        raise SystemExit(f"{folder}: it has {artifact.scheme}, wanted was {scheme}")
    names, errors = sorted(wanted), []
    for name in names[:: -(-len(names) // SAMPLED)]:
        weight = base.read(name).float()
        errors.append(float((artifact.read(name) - weight).norm() / weight.norm()))
        if not errors[-1] < LARGEST_ERROR:
            raise SystemExit(f"{folder}: {name} differs from the model's by {errors[-1]:.2f} of its size")
    return {"linears": len(found), "weight_error": sum(errors) / len(errors)}


def _gptq(folder: Path, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    for module, matrix in matrices(folder):
        yield module, dequantize(matrix, bits).T


def _compressed(folder: Path, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The layout's own words: q + 2^(bits-1) along in, zero + 2^(bits-1) along out, least significant bits first."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if not name.endswith(".weight_packed"):
                    continue
                module = name.removesuffix(".weight_packed")
                rows, columns = tensors.get_tensor(f"{module}.weight_shape").tolist()
                stored_OI = torch.from_numpy(codes_of(tensors.get_tensor(name).T.contiguous(), bits).T.copy())
                codes_OI = stored_OI[:, :columns].float() - 2 ** (bits - 1)
                if f"{module}.weight_zero_point" in tensors.keys():  # noqa: SIM118 - no mapping
                    stored_OG = codes_of(tensors.get_tensor(f"{module}.weight_zero_point"), bits)[:rows]
                    zeros_OG = torch.from_numpy(stored_OG.copy()).float() - 2 ** (bits - 1)
                    codes_OI -= zeros_OG.repeat_interleave(columns // zeros_OG.shape[1], dim=1)
                scales_OG = tensors.get_tensor(f"{module}.weight_scale").float()
                yield module, codes_OI * scales_OG.repeat_interleave(columns // scales_OG.shape[1], dim=1)[:rows]


def _floats(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """4-bit floats as compressed-tensors unpacks them, times their scales in fp32."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(name for name in names if name.endswith(".weight_packed")):
                module, packed = name.removesuffix(".weight_packed"), tensors.get_tensor(name)
                rows, columns = packed.shape[0], 2 * packed.shape[1]
                codes_OI = unpack_fp4_from_uint8(packed, rows, columns, torch.float32)
                scales_OG = tensors.get_tensor(f"{module}.weight_scale")
                scales_OG = decompress_mx_scale(scales_OG) if scales_OG.dtype == torch.uint8 else scales_OG
                scales_OG = scales_OG.float()
                if f"{module}.weight_global_scale" in names:
                    scales_OG = scales_OG / tensors.get_tensor(f"{module}.weight_global_scale")
                yield module, codes_OI * scales_OG.repeat_interleave(columns // scales_OG.shape[1], dim=1)
