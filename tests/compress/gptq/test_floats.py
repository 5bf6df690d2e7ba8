"""4-bit floats in the solver: scales that the formats hold, loops that agree, and what it loses."""

import dataclasses

import pytest
import torch

from moepress.compress.gptq.grid import storable_scales
from moepress.compress.gptq.options import EFFORTS, PLAIN
from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors import floats
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.storage.unpack import exponents

SCHEMES = [Scheme.of_floats(codes) for codes in (Codes.NVFP4, Codes.MXFP4)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.codes.value)


def problem(experts: int = 2, rows: int = 40, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    weight_EOI = torch.randn(experts, rows, columns, generator=generator) * torch.tensor([0.02, 3.0])[:, None, None]
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(experts, 400, columns, generator=generator) @ mixing
    return weight_EOI, inputs.mT @ inputs / 400


def dense(solved: Solved, index: int) -> torch.Tensor:
    scales = solved.scales[index]
    if solved.divisor is not None:
        scales = scales / solved.divisor[index]
    return floats.dense(floats.from_levels(solved.codes[index]), scales, exact=True)


def test_scales_go_to_the_nearest_fp8_number() -> None:
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    wanted = torch.cat((torch.rand(2000).double() * 500, torch.rand(2000).double() * 0.02))
    nearest = every[(wanted[:, None] - every).abs().argmin(dim=1)]
    found = storable_scales(wanted.float(), torch.float8_e4m3fn)
    assert torch.equal((found.double() - wanted).abs(), (nearest - wanted).abs())
    assert torch.equal(found.to(torch.float8_e4m3fn).float(), found)
    odd = torch.tensor([0.0, -1.0, 1e9, 1e-9])
    assert storable_scales(odd, torch.float8_e4m3fn).tolist() == [1, 1, 448, 2**-9]


def test_scales_go_to_the_nearest_power_of_two() -> None:
    every = exponents(torch.arange(1, 253)).double()
    wanted = (torch.rand(2000) * 40 - 20).exp2()
    nearest = every[(wanted.double()[:, None] - every).abs().argmin(dim=1)]
    assert torch.equal(storable_scales(wanted, torch.float8_e8m0fnu).double(), nearest)
    odd = torch.tensor([0.0, 1.5, 1e38, 1e-45])
    assert storable_scales(odd, torch.float8_e8m0fnu).tolist() == [1, 2, 2.0**125, 2.0**-126]


@each_scheme
def test_the_format_holds_what_was_found_and_the_loss_is_that_of_what_it_holds(scheme: Scheme) -> None:
    weight_EOI, hessian_EII = problem()
    solved = solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.bfloat16)
    for index in range(2):
        divisor = None if solved.divisor is None else solved.divisor[index]
        codes = floats.from_levels(solved.codes[index])
        tensors = floats.layer_tensors("m", codes, solved.scales[index], divisor, scheme)
        read = floats.dense(*floats.read_layer("m", tensors, scheme), exact=True)
        assert torch.equal(read, dense(solved, index))
        residual = (weight_EOI[index] - read).double()
        loss = (residual @ hessian_EII[index].double() * residual).sum()
        torch.testing.assert_close(solved.loss[index], loss, rtol=1e-3, atol=0)
        energy = (weight_EOI[index].double() @ hessian_EII[index].double() * weight_EOI[index]).sum()
        torch.testing.assert_close(solved.energy[index], energy, rtol=1e-3, atol=0)
    if solved.divisor is not None:
        torch.testing.assert_close(solved.divisor, 448 * 6 / weight_EOI.abs().amax(dim=(1, 2)))


@each_scheme
def test_more_is_looked_for_at_less_loss(scheme: Scheme) -> None:
    weight_EOI, hessian_EII = problem()
    nothing = torch.zeros_like(hessian_EII)
    nearest = solve(weight_EOI, nothing, scheme, scale_dtype=torch.bfloat16, options=PLAIN)
    residual = weight_EOI - torch.stack([dense(nearest, index) for index in range(2)])
    rounded = ((residual @ hessian_EII) * residual).sum(dim=(1, 2)).double()
    plain, fast, normal = (
        solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.bfloat16, options=options).loss
        for options in (PLAIN, EFFORTS["fast"], EFFORTS["normal"])
    )
    assert bool((plain < rounded).all())
    assert bool((fast < plain).all())
    assert bool((normal <= fast).all())  # powers of two lie so far apart that a refit moves none here
    assert bool((normal < fast).all()) or scheme.codes is Codes.MXFP4


@each_scheme
def test_native_loops_find_what_torch_finds(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress.compress.gptq import native

    if native.library() is None:
        pytest.skip(native.status())
    given = problem()
    options = dataclasses.replace(EFFORTS["normal"], sweeps=20)
    mine = solve(*given, scheme, scale_dtype=torch.bfloat16, options=options)
    monkeypatch.setattr(native, "library", lambda: None)
    theirs = solve(*given, scheme, scale_dtype=torch.bfloat16, options=options)
    assert (mine.scales != theirs.scales).float().mean() < 0.02  # sums in another order
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0.01, atol=0)


def test_a_matrix_of_zeros_stays_one() -> None:
    for scheme in SCHEMES:
        solved = solve(torch.zeros(1, 4, 32), torch.eye(32)[None], scheme, scale_dtype=torch.bfloat16)
        assert not dense(solved, 0).any()
