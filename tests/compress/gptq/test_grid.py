import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.compress.gptq.grid import absmax_scales, dequantize, round_to_nearest, search_scales, storable_scales
from moepress.compress.gptq.levels import SearchPlan
from moepress.converters.safetensors.scheme import Scheme

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weights_of(seed: int, experts: int = 2, rows: int = 5, columns: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, rows, columns, generator=generator) * 0.05


def weighted_error(
    weight_EOI: torch.Tensor, scales_EOG: torch.Tensor, importance_EI: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    codes_EOI = round_to_nearest(weight_EOI, scales_EOG, scheme)
    error_EOI = (dequantize(codes_EOI, scales_EOG, scheme) - weight_EOI).double().square()
    return (error_EOI * importance_EI.unsqueeze(1)).unflatten(-1, (scales_EOG.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_the_search_finds_what_a_readable_loop_finds(bits: int, scale_dtype: torch.dtype) -> None:
    weight_EOI, scheme = weights_of(0), Scheme(bits=bits, group_size=16)
    importance_EI = weights_of(1, rows=1).abs().squeeze(1)
    plan = SearchPlan.even(7, 0.4, 2)
    found_EOG = search_scales(weight_EOI, importance_EI, scheme, scale_dtype=scale_dtype, plan=plan)

    def error_of(scale: torch.Tensor, part: torch.Tensor, share: torch.Tensor) -> float:
        codes = (part / scale).round().clamp(scheme.code_min, scheme.code_max)
        return float(((codes * scale - part).double().square() * share).sum())

    for e in range(2):
        for o in range(5):
            for g in range(2):
                part, share = weight_EOI[e, o, g * 16 : g * 16 + 16], importance_EI[e, g * 16 : g * 16 + 16]
                base = part.abs().max().item() / scheme.code_max
                highest = max(part.max().item() / scheme.code_max, part.min().item() / scheme.code_min)
                tried: dict[float, float] = {}

                def attempt(factor: float, base=base, part=part, share=share, tried=tried) -> None:
                    tried[factor] = error_of(torch.tensor(base * factor).to(scale_dtype).float(), part, share)

                for factor in [*torch.linspace(1.0, 0.4, 7).tolist(), highest / base]:
                    attempt(factor)
                for step in (0.05, 0.025):
                    middle = min(tried, key=tried.__getitem__)
                    attempt(middle + step)
                    attempt(middle - step)
                assert error_of(found_EOG[e, o, g], part, share) == pytest.approx(min(tried.values()), rel=1e-4)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 16, -1]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    magnitude=st.floats(-6, 4),
)
def test_searched_scales_are_positive_storable_and_no_worse_than_absmax(
    seed: int, bits: int, group_size: int, scale_dtype: torch.dtype, magnitude: float
) -> None:
    weight_EOI, scheme = weights_of(seed) * 10.0**magnitude, Scheme(bits=bits, group_size=group_size)
    importance_EI = weights_of(seed + 1, rows=1).square().squeeze(1)
    found_EOG = search_scales(weight_EOI, importance_EI, scheme, scale_dtype=scale_dtype)
    assert found_EOG.dtype == torch.float32
    assert bool((found_EOG > 0).all())
    assert torch.equal(found_EOG.to(scale_dtype).float(), found_EOG)
    plain_EOG = absmax_scales(weight_EOI, scheme, scale_dtype=scale_dtype)
    found_error = weighted_error(weight_EOI, found_EOG, importance_EI, scheme)
    assert bool((found_error <= weighted_error(weight_EOI, plain_EOG, importance_EI, scheme) * (1 + 1e-4)).all())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([8, 16, -1]))
def test_rounding_what_was_dequantized_changes_nothing(seed: int, bits: int, group_size: int) -> None:
    weight_EOI, scheme = weights_of(seed), Scheme(bits=bits, group_size=group_size)
    scales_EOG = search_scales(weight_EOI, torch.ones(2, 32), scheme, scale_dtype=torch.bfloat16)
    codes_EOI = round_to_nearest(weight_EOI, scales_EOG, scheme)
    assert codes_EOI.dtype == torch.int8
    assert scheme.code_min <= codes_EOI.min() <= codes_EOI.max() <= scheme.code_max
    assert torch.equal(round_to_nearest(dequantize(codes_EOI, scales_EOG, scheme), scales_EOG, scheme), codes_EOI)


def test_a_group_that_leans_negative_uses_the_extra_code() -> None:
    weight_EOI = torch.full((1, 1, 8), 0.25)
    weight_EOI[..., 0] = -0.5
    found_EOG = search_scales(weight_EOI, torch.ones(1, 8), Scheme(bits=2, group_size=8), scale_dtype=torch.float32)
    assert found_EOG.item() == 0.25


def test_columns_without_importance_do_not_steer_the_scale() -> None:
    weight_EOI = torch.tensor([[[8.0] + [1.0, -1.0, 0.5] * 5]])
    importance_EI = torch.ones(1, 16)
    importance_EI[0, 0] = 0
    scheme = Scheme(bits=4, group_size=16)
    blind = search_scales(weight_EOI, importance_EI, scheme, scale_dtype=torch.float32)
    seeing = search_scales(weight_EOI, torch.ones(1, 16), scheme, scale_dtype=torch.float32)
    assert blind.item() < seeing.item()


def test_without_any_importance_all_columns_count_alike() -> None:
    weight_EOI, scheme = weights_of(3), Scheme(bits=3, group_size=16)
    zero = search_scales(weight_EOI, torch.zeros(2, 32), scheme, scale_dtype=torch.bfloat16)
    assert torch.equal(zero, search_scales(weight_EOI, torch.ones(2, 32), scheme, scale_dtype=torch.bfloat16))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_an_all_zero_group_gets_scale_one_and_zero_codes(scale_dtype: torch.dtype) -> None:
    weight_EOI, scheme = weights_of(0), Scheme(bits=4, group_size=16)
    weight_EOI[1, 2, 16:] = 0
    scales_EOG = search_scales(weight_EOI, torch.ones(2, 32), scheme, scale_dtype=scale_dtype)
    assert scales_EOG[1, 2, 1] == 1.0
    assert not round_to_nearest(weight_EOI, scales_EOG, scheme)[1, 2, 16:].any()


@pytest.mark.parametrize("extreme", [1e-12, 1e-30, 1e12])
def test_half_precision_scales_stay_positive_and_finite_at_the_extremes(extreme: float) -> None:
    scales = storable_scales(torch.tensor([extreme, 0.0]), torch.float16)
    assert bool(((scales > 0) & scales.isfinite()).all())


def test_the_search_does_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_EOI, scheme = weights_of(4), Scheme(bits=4, group_size=8)
    importance_EI = weights_of(5, rows=1).square().squeeze(1)
    whole = search_scales(weight_EOI, importance_EI, scheme, scale_dtype=torch.bfloat16)
    monkeypatch.setattr("moepress.compress.gptq.grid.CHUNK_ELEMENTS", 3 * 32)
    assert torch.equal(whole, search_scales(weight_EOI, importance_EI, scheme, scale_dtype=torch.bfloat16))


def test_senseless_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        SearchPlan.even(0, 0.3, 2)


def test_scales_that_do_not_fit_the_scheme_are_refused() -> None:
    codes_EOI = torch.zeros(1, 2, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit"):
        dequantize(codes_EOI, torch.ones(1, 2, 2), Scheme(group_size=8))
