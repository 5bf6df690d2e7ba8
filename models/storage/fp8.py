"""fp8 block-scaled weights, as DeepSeek-V3 and R1 store them: `weight` F8_E4M3 and `weight_scale_inv` F32."""

import torch
from torch import Tensor

from moepress.models.storage.finite import all_finite
from moepress.models.storage.tensors import tensor_bytes

_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def dequantize_blocks(weight_OI: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """Turn an fp8 matrix into fp32: every block is multiplied by its scale.

    Args:
        weight_OI: float8_e4m3fn [O, I].
        scale_inv: float32 [ceil(O / block[0]), ceil(I / block[1])]; "inv" because it undoes the scaling.
        block: rows and columns of a block, (128, 128) for DeepSeek; the last blocks may be cut off by the edge.

    Returns:
        float32 [O, I].

    Raises:
        ValueError: the number of scales does not fit the matrix.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
    """
    rows, columns = weight_OI.shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(f"{tuple(scale_inv.shape)} block scales, but a {rows} x {columns} matrix needs {wanted}")
    out, scales = _values(weight_OI), scale_inv.float()
    whole = rows // block[0], columns // block[1]  # blocks that the edge does not cut off: one operation for all
    down, right = whole[0] * block[0], whole[1] * block[1]
    inner = out[:down, :right].unflatten(1, (whole[1], block[1])).unflatten(0, (whole[0], block[0]))
    inner.mul_(scales[: whole[0], None, : whole[1], None])
    if right < columns:
        out[:, right:].mul_(scales[:, whole[1]].repeat_interleave(block[0])[:rows, None])
    if down < rows:
        out[down:, :right].mul_(scales[whole[0], : whole[1]].repeat_interleave(block[1]))
    return out


def _values(weight: Tensor) -> Tensor:
    """fp8 to fp32; on the CPU by a table of its 256 values, which is faster than torch's conversion."""
    if weight.device.type != "cpu":
        return weight.to(torch.float32)
    return torch.from_numpy(_TABLE.take(weight.view(torch.uint8).numpy()))


def is_finite(weight: Tensor, scale_inv: Tensor) -> bool:
    """Whether an fp8 matrix is free of NaN and Inf once it is scaled, seen without scaling it.

    Args:
        weight: float8_e4m3fn.
        scale_inv: its block scales.
    """
    largest = scale_inv.float() * 448  # no fp8 number is larger, so no product is
    return bool(torch.isfinite(largest).all()) and all_finite("F8_E4M3", tensor_bytes(weight))
