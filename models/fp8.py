"""fp8 block-scaled weights, as DeepSeek-V3 and R1 store them: `weight` F8_E4M3 and `weight_scale_inv` F32."""

import torch
from torch import Tensor


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
    out = weight_OI.to(torch.float32)
    for index in range(wanted[0]):
        band = out[index * block[0] : (index + 1) * block[0]]
        band *= scale_inv[index].float().repeat_interleave(block[1])[:columns]
    return out
