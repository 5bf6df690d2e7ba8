"""Attention where values are narrower than keys (MLA): the fused kernel, which wants one width."""

from functools import cache
from typing import Any

from torch import Tensor, nn

NAME = "sdpa_of_one_width"
"""The `attn_implementation` of `register`; transformers makes the same checks for every name with `sdpa` in it."""


@cache
def register() -> str:
    """Tell transformers of `one_width`, with the masks of `sdpa`.

    Returns:
        `NAME`, for `attn_implementation=`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, one_width)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def one_width(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, for keys and values of one width; narrower values get columns of zeros first.

    Torch's fused attention on the CPU wants one width for queries, keys and values, as flash attention on CUDA does;
    for others torch forms all [T, T] scores, several times. Zeros in the values give zeros in the output and change
    nothing else. The wasted work is (key width / value width - 1) of the second of the two products.

    Args:
        module: the attention module.
        query: [B, heads, T, key width].
        key: [B, key heads, T, key width].
        value: [B, key heads, T, value width].
        attention_mask: None where it is causal.
        options: as for transformers' `sdpa_attention_forward`.

    Returns:
        The heads' outputs [B, T, heads, value width], and None for the probabilities.

    Source: `sdp_utils_cpp.cpp` of torch 2.13, `check_head_dim_size_cpp`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = value.shape[-1]
    missing = key.shape[-1] - width
    if missing <= 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    padded = nn.functional.pad(value, (0, missing))
    output, _ = sdpa_attention_forward(module, query, key, padded, attention_mask, **options)
    return output[..., :width], None
