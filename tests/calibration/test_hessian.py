"""Hessians: plain sums, shrinkage by hand, and which tokens they are made of."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS, keep_of, logits_of, pruned_folder, watched
from torch import Tensor
from torch.nn.functional import silu

from moepress.calibration.hessian import (
    HessianOptions,
    Moments,
    cross,
    gram,
    hessian_for,
    moments,
    shares,
)
from moepress.compress.gptq.coded import Coded
from moepress.compress.gptq.moments import Inputs, down_moments, input_moments, pooled_hessian, pooled_inputs
from moepress.models.forward.streamed import StreamedModel, tokens_of
from moepress.models.forward.walk import Scratch, Stream, add_experts, first_step, open_stream
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import Expert, prune_source


def rows(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_gram_is_the_sum_of_outer_products() -> None:
    inputs, weights = rows(7), torch.tensor([0.0, 1.0, 0.5, 2.0, 0.25, 1.0, 3.0])
    expected = sum(a * torch.outer(x, x) for a, x in zip(weights, inputs, strict=True))
    torch.testing.assert_close(gram(inputs, weights), expected)
    torch.testing.assert_close(gram(inputs), sum(torch.outer(x, x) for x in inputs))
    assert torch.equal(gram(inputs[:0]), torch.zeros(5, 5))


def test_gram_of_many_rows_is_summed_in_parts() -> None:
    inputs, weights = rows(20_000), torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    wide = inputs.double()
    expected = wide.T @ (wide * weights.double()[:, None])
    torch.testing.assert_close(gram(inputs, weights).double(), expected, rtol=1e-4, atol=1e-2)


def test_gram_of_half_precision_rows_is_summed_in_float32() -> None:
    inputs = torch.full((4096, 2), 10.0, dtype=torch.float16)
    assert torch.equal(gram(inputs), torch.full((2, 2), 409_600.0))  # beyond the largest fp16


def test_cross_moments_are_of_what_the_original_has_more() -> None:
    inputs, originals, weights = rows(7), rows(7, seed=1), torch.tensor([0.0, 1.0, 0.5, 2.0, 0.25, 1.0, 3.0])
    pairs = list(zip(weights, originals, inputs, strict=True))
    expected = sum(a * torch.outer(y - x, x) for a, y, x in pairs)
    torch.testing.assert_close(cross(inputs, originals, weights), expected)
    torch.testing.assert_close(cross(inputs, originals), sum(torch.outer(y - x, x) for _, y, x in pairs))
    assert torch.equal(cross(inputs, inputs, weights), torch.zeros(5, 5))
    many, more = rows(20_000), rows(20_000, seed=1)
    expected = (more.double() - many.double()).T @ many.double()
    torch.testing.assert_close(cross(many, more).double(), expected, rtol=1e-4, atol=1e-2)


def test_both_moments_are_added_divided_and_shrunk_alike() -> None:
    inputs, originals, pooled = rows(9), rows(9, seed=1), Moments(hessian=torch.eye(5), cross=2 * torch.eye(5))
    whole = moments(inputs, originals)
    parts = moments(inputs[:4], originals[:4])
    parts.add(moments(inputs[4:], originals[4:]))
    assert whole.cross is not None
    assert parts.cross is not None
    torch.testing.assert_close(parts.hessian, whole.hessian)
    torch.testing.assert_close(parts.cross, whole.cross)
    torch.testing.assert_close(whole.over(9).cross, cross(inputs, originals) / 9)
    shrunk = pooled.times(0.25)
    shrunk.gather(inputs[:4], originals[:4], scale=1 / 12)
    shrunk.gather(inputs[4:], originals[4:], scale=1 / 12)
    torch.testing.assert_close(shrunk.complete().hessian, gram(inputs) / 12 + torch.eye(5) / 4)
    torch.testing.assert_close(shrunk.cross, cross(inputs, originals) / 12 + torch.eye(5) / 2)
    assert torch.equal(pooled.hessian, torch.eye(5))
    assert moments(inputs).cross is None
    assert moments(inputs).times(2.0).cross is None


def test_wide_moments_are_gathered_in_place() -> None:
    wide, weights = rows(40, size=1500), torch.rand(40, generator=torch.Generator().manual_seed(1))
    out = torch.full((1500, 1500), float("nan"))
    found = Moments(hessian=torch.eye(1500)).times(2.0, out)
    found.gather(wide, weights_T=weights, scale=0.5)
    assert found.complete().hessian is out
    expected = (wide * weights[:, None]).T @ wide / 2 + 2 * torch.eye(1500)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.tril(-256), out.triu(256).T)


def test_targets_have_a_share_of_the_correction_or_none() -> None:
    for asymmetry in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="need 0 <= asymmetry <= 1"):
            HessianOptions(asymmetry=asymmetry)


def test_shrinkage_mixes_the_means_by_the_number_of_tokens() -> None:
    assert shares(6, 6.0, 2.0) == (pytest.approx(6 / 8 / 6), pytest.approx(2 / 8))
    assert shares(6, 18.0, 2.0) == (pytest.approx(6 / 8 / 18), pytest.approx(2 / 8))  # a constant a_t changes nothing


def test_an_expert_without_tokens_gets_the_pooled_hessian() -> None:
    assert shares(0, 0.0, 32.0) == (0.0, 1.0)
    assert shares(3, 0.0, 1.0) == (0.0, 0.25)  # tokens that count for nothing


def test_an_expert_with_many_tokens_gets_nearly_its_own() -> None:
    assert shares(500, 500.0, 0.0) == (1 / 500, 0.0)


def stream_at(source: object, windows: Tensor, layer: int, folder: Path) -> Stream:
    """A stream after the first step of a layer."""
    model = StreamedModel(source, device=CPU, dtype=torch.float32)  # type: ignore[arg-type]
    stream = open_stream(model, windows, Scratch(folder, LIMITS.memory_bytes), LIMITS, observe=False)
    for number in range(layer + 1):
        model.load_layer(number)
        if first_step(stream, number) and number < layer:
            add_experts(stream, number)
    return stream


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_hessians_are_of_the_tokens_that_the_pruned_router_sends(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, power: int
) -> None:
    """Held against transformers' model of the pruned folder, whose experts are watched; expert by expert."""
    folder = tiny_model(key)
    checkpoint = open_checkpoint(folder)
    keep = keep_of(checkpoint, checkpoint.shape.experts // 2)
    pruned_folder(folder, keep, tmp_path / "pruned")
    windows = tiny_models.windows(256, count=6, length=12)
    model = tiny_models.reference(tmp_path / "pruned")
    with watched(model) as seen:
        logits_of(model, windows)
    layer, options = 2, HessianOptions(weight_power=power, shrinkage_tokens=0.0)
    with torch.inference_mode():
        stream = stream_at(prune_source(checkpoint, keep), windows, layer, tmp_path)
        experts = stream.model.shape.experts
        positions, pooled, sample = tokens_of(stream.chosen, experts), pooled_hessian(stream), torch.zeros(0, 64)
        there = seen[layer]
        torch.testing.assert_close(pooled, there["inputs"].T @ there["inputs"] / windows.numel(), rtol=1e-3, atol=1e-4)
        counts = []
        for expert in range(experts):
            inputs, weights = [], []
            for token, row in enumerate(there["chosen"].tolist()):
                if expert in row:
                    inputs.append(there["inputs"][token])
                    weights.append(float(there["weights"][token, row.index(expert)]) ** power)
            counts.append(len(inputs))
            if not inputs:
                continue
            mass, stacked = torch.tensor(weights), torch.stack(inputs)
            expected = (stacked * mass[:, None]).T @ stacked / mass.sum()
            inputs_here = Inputs(stream=stream, originals=None, options=options)
            found = input_moments(inputs_here, positions[expert], pooled).hessian
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
            gate, up = model.model.layers[layer].mlp.experts.gate_up_proj[expert].chunk(2)
            middle = silu(stacked @ gate.T) * (stacked @ up.T)
            expected = (middle * mass[:, None]).T @ middle / mass.sum()
            plain, original = (coded(gate), coded(up)), Expert(gate=gate, up=up, down=up.T)
            given = (inputs_here, layer, positions[expert], sample, plain, original)
            moments, kept = down_moments(*given, chose=len(positions[expert][0]), keep=True)
            torch.testing.assert_close(moments.hessian, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
            torch.testing.assert_close(kept, middle, rtol=1e-3, atol=1e-4)
        assert sum(counts) == windows.numel() * stream.model.shape.top_k
        assert len(set(counts)) > 1


def coded(weight: Tensor) -> Coded:
    """Any matrix as codes 1 and a scale per element, so that its dense form is itself."""
    return Coded(codes=torch.ones(weight.shape, dtype=torch.int8), scales=weight.detach())


def test_the_sample_for_rare_experts_is_spread_over_all_tokens(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    windows = tiny_models.windows(256, count=6, length=12)
    with torch.inference_mode():
        stream = stream_at(open_checkpoint(tiny_model("mixtral")), windows, 0, tmp_path)
    sample = pooled_inputs(stream, HessianOptions(pooled_tokens=18))
    assert torch.equal(sample, stream.inputs[::4])
    assert torch.equal(pooled_inputs(stream, HessianOptions()), stream.inputs)


def test_a_sample_of_few_tokens_of_many_windows_has_some_of_every_domain_though_they_take_turns() -> None:
    windows = torch.arange(64)[:, None].expand(-1, 8)
    model = SimpleNamespace(device=torch.device("cpu"))
    stream = SimpleNamespace(hidden=windows[..., None], inputs=windows.reshape(-1, 1), tokens=512, model=model)
    taken = pooled_inputs(cast(Stream, stream), HessianOptions(pooled_tokens=16))
    assert (taken % 4).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("match", "bits", "layer_bits", "original"),
    [
        ("auto", 8, {}, False),
        ("auto", 4, {}, True),
        ("auto", 8, {1: 8, 2: 3}, True),
        ("auto", 8, {1: 4}, True),
        ("own", 2, {}, False),
        ("original", 8, {}, True),
    ],
)
def test_the_original_gives_the_targets_where_asked_or_where_bits_are_few(
    match: str, bits: int, layer_bits: dict[int, int], original: bool
) -> None:
    assert hessian_for(match, bits, layer_bits).asymmetry == float(original)
    assert hessian_for(match, bits, layer_bits, "fast").asymmetry == float(match == "original")
