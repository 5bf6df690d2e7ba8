"""The fused kernel for narrow values, against transformers' own `sdpa` and `eager`."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moepress.models.families.attention import NAME, one_width
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.dense import load_dense
from moepress.models.forward.streamed import StreamedModel
from moepress.models.storage.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def heads(
    key_width: int, value_width: int, *, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """A module as the attention functions see it; queries, keys and values of 2 windows, 6 heads, 40 tokens."""
    generator = torch.Generator().manual_seed(key_width * 100 + value_width)
    shapes = ((2, 6, 40, key_width), (2, 6 // groups, 40, key_width), (2, 6 // groups, 40, value_width))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return SimpleNamespace(is_causal=True, num_key_value_groups=groups), (query, key, value)


def window_mask(tokens: int = 40, width: int = 7) -> Tensor:
    """What transformers makes for a sliding window, bool [2, 1, T, T]."""
    square = torch.ones(tokens, tokens, dtype=torch.bool)
    return square.tril().triu(1 - width).expand(2, 1, tokens, tokens)


@pytest.mark.parametrize(("key_width", "value_width"), [(24, 16), (192, 128), (17, 5), (16, 16), (16, 24)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window"])
def test_outputs_are_those_of_transformers(key_width: int, value_width: int, groups: int, masked: bool) -> None:
    module, tensors = heads(key_width, value_width, groups=groups)
    mask = window_mask() if masked else None
    for scaling in (None, 0.3):
        ours, none = one_width(module, *tensors, mask, scaling=scaling)
        theirs, _ = sdpa_attention_forward(module, *tensors, mask, scaling=scaling)
        assert none is None
        assert ours.shape == (2, 40, 6, value_width)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window"])
def test_narrow_values_run_in_the_fused_kernel(dtype: torch.dtype, masked: bool) -> None:
    module, tensors = heads(24, 16, dtype=dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        one_width(module, *tensors, window_mask() if masked else None)
        with (
            pytest.warns(UserWarning, match="same last dimension|kernel not used"),
            pytest.raises(RuntimeError, match="No available kernel"),
        ):
            sdpa_attention_forward(module, *tensors, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_columns_of_the_values_change_no_bit(dtype: torch.dtype) -> None:
    module, (query, key, value) = heads(192, 192, dtype=dtype)
    whole, _ = sdpa_attention_forward(module, query, key, value, None)
    ours, _ = one_width(module, query, key, value[..., :128], None)
    assert torch.equal(ours, whole[..., :128])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bit_it_is_about_as_exact(dtype: torch.dtype) -> None:
    """The fused kernel rounds the probabilities to 16 bit before the second product, as flash attention does."""
    module, tensors = heads(192, 128, dtype=dtype)
    truth, _ = sdpa_attention_forward(module, *(tensor.double() for tensor in tensors), None)
    ours, theirs = (
        (attend(module, *tensors, None)[0].double() - truth).square().mean().sqrt()
        for attend in (one_width, sdpa_attention_forward)
    )
    assert ours < 1.3 * theirs
    assert ours < truth.square().mean().sqrt() * torch.finfo(dtype).eps


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_plain_causal_models_get_no_mask(tiny_model: Callable[..., Path], key: str) -> None:
    """Flash attention on CUDA takes no mask; transformers makes one only where a window cuts some tokens off."""
    model = StreamedModel(open_checkpoint(tiny_model(key)), device=CPU, dtype=torch.float32)
    assert model.config._attn_implementation == NAME
    masks: list[Tensor | None] = []
    for layer in range(model.shape.layers):
        keep = lambda _module, _arguments, keywords: masks.append(keywords["attention_mask"])  # noqa: E731
        with_mask = model.layer(layer).register_forward_pre_hook(keep, with_kwargs=True)
        model.load_layer(layer)
        model.run_layer(layer, torch.zeros(2, 24, model.shape.hidden))
        with_mask.remove()
    assert [mask is not None for mask in masks] == [key == "mixtral_window"] * model.shape.layers


def test_a_whole_model_runs_as_in_transformers(tiny_model: Callable[..., Path]) -> None:
    """Its speed is that of the original, so its attention is too."""
    source = open_checkpoint(tiny_model("deepseek_v3"))
    assert load_dense(source, device=CPU, dtype=torch.float32).config._attn_implementation == "sdpa"
    assert build_skeleton(source.config, attention="eager").config._attn_implementation == "eager"
