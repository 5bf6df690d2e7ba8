"""The refit of a router: its gradient against autograd, its step against dense least squares, what must not change."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from moepress.compress.pruning.refit import (
    LONGEST,
    Known,
    candidates,
    error,
    gradient,
    moved,
    refit,
    split,
    total_error,
    weights_of,
)
from moepress.models.families.router import Router
from moepress.models.families.routing import choice_scores, combine_weights, route, scores

SOFTMAX = Router(scoring="softmax", group_score=None, groups=1, top_groups=1, top_k=2, renormalise=False, scale=1.5)
ROUTERS = {
    "softmax": SOFTMAX,
    "softmax, renormalised": dataclasses.replace(SOFTMAX, renormalise=True, scale=1.0),
    "softmax, groups": dataclasses.replace(SOFTMAX, group_score="max", groups=4, top_groups=2),
    "sigmoid": dataclasses.replace(SOFTMAX, scoring="sigmoid"),
    "sigmoid, renormalised, groups": Router(
        scoring="sigmoid", group_score="top2", groups=4, top_groups=2, top_k=3, renormalise=True, scale=2.5
    ),
    "sqrtsoftplus": dataclasses.replace(SOFTMAX, scoring="sqrtsoftplus", renormalise=True),
}
EXPERTS, WIDTH = 8, 5
EVERY = [slice(0, 20), slice(20, 48)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Tokens of a layer: outputs of all experts [T, E, D], what tokens ought to get [T, D], the router's bias."""

    known: Known
    outputs: Tensor
    target: Tensor
    bias: Tensor | None


def made(router: Router, *, seed: int = 0, count: int = EXPERTS, tokens: int = 48, biased: bool = False) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    inputs, rows = (torch.randn(n, WIDTH, generator=generator) for n in (tokens, EXPERTS))
    outputs = torch.randn(tokens, EXPERTS, WIDTH, generator=generator) + 0.5
    target = torch.randn(tokens, WIDTH, generator=generator) + 1
    bias = 0.2 * torch.randn(EXPERTS, generator=generator) if biased else None
    logits = inputs @ rows.T
    slots = candidates(router, logits, bias, count)
    empty = slots == EXPERTS
    own = outputs.gather(1, slots.masked_fill(empty, 0)[:, :, None].expand(-1, -1, WIDTH))
    own = own.masked_fill(empty[:, :, None], 0.0)
    known = Known(
        inputs=inputs,
        logits=logits,
        slots=slots,
        gram=torch.bmm(own, own.mT),
        moment=torch.bmm(own, target[:, :, None]).squeeze(2),
    )
    return Layer(known=known, outputs=outputs, target=target, bias=bias)


def errors_of(layer: Layer, chosen: Tensor, weights: Tensor) -> Tensor:
    """|y - sum w f|^2 of every token, by the outputs themselves."""
    own = layer.outputs.gather(1, chosen[:, :, None].expand(-1, -1, WIDTH))
    return (layer.target - (weights[:, :, None] * own).sum(dim=1)).square().sum(dim=1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_weights_and_errors_are_those_of_the_routing_rule(name: str, biased: bool) -> None:
    router, square = ROUTERS[name], 0.0
    layer = made(router, biased=biased, count=2 * ROUTERS[name].top_k)
    chosen, weights = route(router, layer.known.logits, layer.bias)
    square = float(layer.target.square().sum())
    ours = weights_of(router, layer.known, layer.known.logits, layer.bias)
    dense = torch.zeros(len(chosen), EXPERTS + 1).scatter_(1, layer.known.slots, ours)[:, :EXPERTS]
    torch.testing.assert_close(dense, torch.zeros_like(dense).scatter_(1, chosen, weights))
    wanted = float(errors_of(layer, chosen, weights).sum())
    assert float(error(layer.known, ours)) + square == pytest.approx(wanted, rel=1e-5)
    nothing = torch.zeros(EXPERTS, WIDTH)
    assert total_error(router, layer.known, EVERY, layer.bias, nothing) + square == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_gradient_of_those_chosen_is_that_of_autograd(name: str) -> None:
    router = ROUTERS[name]
    layer = made(router, biased=router.scoring != "softmax")
    logits = layer.known.logits.clone().requires_grad_(True)
    scored = scores(router, logits)
    chosen = choice_scores(router, scored.detach(), layer.bias).topk(router.top_k, dim=-1).indices
    errors_of(layer, chosen, combine_weights(router, scored, chosen)).sum().backward()  # type: ignore[no-untyped-call]
    ours = gradient(router, layer.known, layer.known.logits, layer.bias, 0.0)
    torch.testing.assert_close(ours, logits.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_an_expert_that_would_lower_the_error_is_pulled_up_before_it_is_chosen(name: str) -> None:
    router = ROUTERS[name]
    layer = made(router, seed=1)
    hard, soft = (gradient(router, layer.known, layer.known.logits, None, width) for width in (0.0, 0.1))
    chosen, weights = route(router, layer.known.logits, None)
    allowed = torch.isfinite(choice_scores(router, scores(router, layer.known.logits), None))
    # The slope of the error in an expert's weight, by its output and what the token lacks.
    given = (weights[:, :, None] * layer.outputs.gather(1, chosen[:, :, None].expand(-1, -1, WIDTH))).sum(dim=1)
    slope = 2 * torch.einsum("td,ted->te", given - layer.target, layer.outputs)
    if router.renormalise:  # weights of the others shrink as it comes in
        slope = slope - 2 * ((given - layer.target) * given / router.scale).sum(dim=1, keepdim=True)
    out = torch.ones_like(slope, dtype=torch.bool).scatter_(1, chosen, value=False) & allowed
    pulled = (soft - hard)[out]
    assert float(pulled.abs().max()) > 0
    if router.scoring != "softmax":  # there a logit moves all scores
        assert (pulled * slope[out] >= -1e-6).all()
    assert (soft[~allowed] == 0).all() or router.scoring == "softmax"


def test_a_round_is_the_dense_ridge_fit_of_the_rows() -> None:
    router, ridge = ROUTERS["softmax, renormalised"], 0.3
    layer = made(router)
    first = next(refit(router, layer.known, EVERY, None, ridge=ridge))
    inputs = layer.known.inputs.double()
    pull = math.sqrt(ridge * float(inputs.square().sum()) / WIDTH) * torch.eye(WIDTH, dtype=torch.float64)
    least = scores(router, layer.known.logits).topk(router.top_k, dim=-1).values[:, -1]
    slope = gradient(router, layer.known, layer.known.logits, None, 0.2 * float(least.mean())).double()
    right = torch.cat((-slope, torch.zeros(WIDTH, EXPERTS, dtype=torch.float64)))
    expected = torch.linalg.lstsq(torch.cat((inputs, pull)), right).solution.T
    torch.testing.assert_close(first.double() / first.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-5)
    length = float((layer.known.inputs @ first.T).square().mean().sqrt())
    assert length == pytest.approx(LONGEST, rel=1e-4) or length < LONGEST


@pytest.mark.parametrize("name", ROUTERS)
def test_each_round_lowers_the_error(name: str) -> None:
    router = ROUTERS[name]
    layer = made(router, biased=router.scoring == "sigmoid")
    found = [torch.zeros(EXPERTS, WIDTH), *refit(router, layer.known, EVERY, layer.bias)]
    errors = []
    for added in found:
        chosen, weights = route(router, moved(layer.known, added), layer.bias)
        errors.append(float(errors_of(layer, chosen, weights).sum()))
    assert len(errors) > 3
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


def test_rows_that_gave_the_target_are_found_again() -> None:
    """What is fitted to is the output under other rows: most of the error that the change has made goes."""
    router, everywhere = ROUTERS["sigmoid"], [slice(0, 400)]
    layer = made(router, tokens=400)
    aim = 0.3 * torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(7))
    wanted = weights_of(router, layer.known, moved(layer.known, aim), None)
    known = dataclasses.replace(layer.known, moment=torch.bmm(wanted[:, None], layer.known.gram).squeeze(1))
    square = float((wanted * known.moment).sum())
    first = total_error(router, known, everywhere, None, torch.zeros(EXPERTS, WIDTH)) + square
    *_, last = refit(router, known, everywhere, None, rounds=60, ridge=1e-3)
    assert total_error(router, known, everywhere, None, last) + square < 0.4 * first


def test_where_the_target_is_met_nothing_is_added() -> None:
    router = ROUTERS["sigmoid"]
    layer = made(router)
    ours = weights_of(router, layer.known, layer.known.logits, None)
    met = dataclasses.replace(layer.known, moment=torch.bmm(ours[:, None], layer.known.gram).squeeze(1))
    for added in refit(router, met, EVERY, None):
        assert float((met.inputs @ added.T).abs().max()) < 0.05  # rounding, and next to nothing
    before = total_error(router, met, EVERY, None, torch.zeros(EXPERTS, WIDTH))
    assert before == pytest.approx(-float((ours * met.moment).sum()), rel=1e-5)


@pytest.mark.parametrize(("windows", "length"), [(1, 8), (2, 8), (3, 5000), (16, 512), (9, 1)])
def test_every_token_is_learned_from_or_held_out(windows: int, length: int) -> None:
    learned, held = split(windows, length)
    seen = torch.zeros(windows * length, dtype=torch.int64)
    for part in (*learned, *held):
        seen[part] += 1
    assert (seen == 1).all()
    assert 0 < sum(part.stop - part.start for part in held) <= max(windows // 4, 1) * length
    assert all(part.stop - part.start <= max(8192, length) for part in (*learned, *held))
