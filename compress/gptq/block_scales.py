"""Scales and minima on GGUF's grids: what of a block is fp16, what of a group a small integer, chosen by a weighted
search before any code is.

Each group's best scale (and minimum) is searched as if it could be any number; then a block's d is the one that makes
its groups' integers fit, and d, dmin and the integers are improved in turn: least squares for d and dmin with integers
and codes fixed, then the integers nearest to each group's own least squares. What is best of all that was tried stays.

Letters: R rows, I columns, B blocks of a row, G groups of a row, g columns of a group, n groups of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.grid import normalised, search_scales_on
from moepress.compress.gptq.levels import Grid, SearchPlan
from moepress.compress.gptq.minimum import search_with_minimum
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.blocks import Blocks, group_scales

_ROUNDS = 3
_FINE = SearchPlan(factors=tuple(torch.linspace(1.06, 0.82, 12, dtype=torch.float64).tolist()), halvings=0)
_COARSE = SearchPlan(factors=tuple(torch.linspace(1.08, 0.6, 12, dtype=torch.float64).tolist()), halvings=0)
"""How far the levels of a group with a minimum are spread over its range: with few of them, clipping pays."""
_NO_SCALE = 1e-20
"""Stands for a scale of 0: codes of such a group do not matter."""
_CHUNK_ELEMENTS = 1 << 20
_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """The fp16 numbers and integers of some rows, and what they make of each group.

    Attributes:
        d, scales, dmin, minima: as in `Blocks`; [R, B] fp16 and [R, G] uint8.
        scale: [R, G] fp32, not 0.
        offset: [R, G] fp32, or None.
    """

    d: Tensor
    scales: Tensor | None
    dmin: Tensor | None
    minima: Tensor | None
    scale: Tensor
    offset: Tensor | None

    def blocks(self, codes_RI: Tensor) -> Blocks:
        """With codes, uint8 from 0 on."""
        return Blocks(codes=codes_RI, d=self.d, scales=self.scales, dmin=self.dmin, minima=self.minima)


def grid_of(kind: BlockType) -> Grid:
    """What codes of a block type stand for before scale and minimum."""
    if kind.table is not None:
        return Grid(levels=tuple(map(float, kind.table)), either_sign=True)
    levels = tuple(float(code - kind.zero) for code in range(1 << kind.bits))
    return Grid(levels=levels, either_sign=not kind.minimum, minimum=kind.minimum)


def stored_codes(kind: BlockType, codes: Tensor) -> Tensor:
    """The solver's int8 codes as the block stores them: uint8 from 0 on."""
    grid = grid_of(kind)
    return (codes.short() - int(grid.low)).to(torch.uint8) if grid.integers else codes.view(torch.uint8)


def search_blocks(kind: BlockType, weight_RI: Tensor, importance_I: Tensor) -> BlockScales:
    """Scales and minima of all rows.

    Args:
        kind: a block type.
        weight_RI: fp32.
        importance_I: fp32, >= 0: weight of a column's squared error.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight_RI.shape[1])
    parts = [_searched(kind, part, importance_I) for part in weight_RI.split(rows)]
    if len(parts) == 1:
        return parts[0]

    def whole(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    d, scale = whole("d"), whole("scale")
    assert d is not None
    assert scale is not None
    more = {name: whole(name) for name in ("scales", "dmin", "minima", "offset")}
    return BlockScales(d=d, scale=scale, **more)


def _searched(kind: BlockType, weight_RI: Tensor, importance_I: Tensor) -> BlockScales:
    grid, given = grid_of(kind), (weight_RI[None], importance_I[None])
    plan = _FINE if kind.bits >= 4 else _COARSE
    if not kind.scale_bits:
        if kind.minimum:
            scale, offset = search_with_minimum(*given, grid, kind.group, torch.float16, plan)
            return made(kind, scale[0].half(), None, offset[0].half(), None)
        scale = search_scales_on(*given, grid, kind.group, torch.float16)
        return made(kind, scale[0].half(), None, None, None)
    problem = _Problem.of(kind, grid, weight_RI, importance_I)
    if kind.minimum:
        scale, offset = search_with_minimum(*given, grid, kind.group, torch.float32, plan)
        return _with_minimum(problem, scale[0], offset[0])
    return _signed(problem, search_scales_on(*given, grid, kind.group, torch.float32)[0])


def made(kind: BlockType, d: Tensor, scales: Tensor | None, dmin: Tensor | None, minima: Tensor | None) -> BlockScales:
    """With each group's scale and offset as ggml multiplies them."""
    bare = Blocks(codes=torch.empty(0), d=d, scales=scales, dmin=dmin, minima=minima)
    scale, offset = group_scales(kind, bare)
    return BlockScales(
        d=d,
        scales=scales,
        dmin=dmin,
        minima=minima,
        scale=torch.where(scale == 0, torch.full_like(scale, _NO_SCALE), scale),
        offset=offset,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """Weights and their importance by block and group: [R, B, n, g] and [B, n, g]."""

    kind: BlockType
    grid: Grid
    weight: Tensor
    weigh: Tensor

    @classmethod
    def of(cls, kind: BlockType, grid: Grid, weight_RI: Tensor, importance_I: Tensor) -> "_Problem":
        shape = (-1, kind.columns // kind.group, kind.group)
        return cls(
            kind=kind,
            grid=grid,
            weight=weight_RI.unflatten(1, shape),
            weigh=_weighing(importance_I, kind).unflatten(0, shape),
        )

    def levels(self, found: BlockScales) -> Tensor:
        """The nearest ones, [R, B, n, g]."""
        scale, offset = self._by_block(found.scale), found.offset
        above = self.weight if offset is None else self.weight - self._by_block(offset)
        return self.grid.nearest(above / scale)

    def error(self, found: BlockScales, levels: Tensor) -> Tensor:
        """Weighted squares, [R, B]."""
        values = levels * self._by_block(found.scale)
        if found.offset is not None:
            values = values + self._by_block(found.offset)
        error: Tensor = (values - self.weight).square_().mul_(self.weigh).sum(dim=(-1, -2))
        return error

    def _by_block(self, groups_RG: Tensor) -> Tensor:
        shaped: Tensor = groups_RG.unflatten(1, (-1, self.kind.columns // self.kind.group))[..., None]
        return shaped


def _weighing(importance_I: Tensor, kind: BlockType) -> Tensor:
    """Importance with the largest of each block 1."""
    return normalised(importance_I.unflatten(0, (-1, kind.columns)).float()).flatten()


def _best(problem: _Problem, best: BlockScales, other: BlockScales, errors: Tensor) -> tuple[BlockScales, Tensor]:
    """Of every block the better one, and its error."""
    found = problem.error(other, problem.levels(other))
    better = found < errors
    groups = better.repeat_interleave(problem.kind.columns // problem.kind.group, dim=1)

    def pick(name: str) -> Tensor | None:
        ours, theirs = getattr(best, name), getattr(other, name)
        return None if ours is None else torch.where(better if ours.shape == better.shape else groups, theirs, ours)

    chosen = {name: pick(name) for name in ("d", "scales", "dmin", "minima", "scale", "offset")}
    return BlockScales(**chosen), torch.where(better, found, errors)  # type: ignore[arg-type]


def _signed(problem: _Problem, scale_RG: Tensor) -> BlockScales:
    """Q3_K, Q6_K, IQ4_XS: integers of either sign."""
    kind = problem.kind
    low, high = -kind.scale_zero, (1 << kind.scale_bits) - 1 - kind.scale_zero
    wanted = scale_RG.unflatten(1, (-1, kind.columns // kind.group))

    def rounded(d_RB: Tensor, wanted_RBn: Tensor) -> BlockScales:
        half = d_RB.half()
        step = torch.where(half == 0, torch.ones_like(half), half).float()[..., None]
        integers = (wanted_RBn / step).round().clamp(low, high)
        return made(kind, half, (integers + kind.scale_zero).to(torch.uint8).flatten(1), None, None)

    place = wanted.abs().argmax(dim=-1, keepdim=True)
    largest = wanted.gather(-1, place)[..., 0]
    best = rounded(largest / low, wanted)  # the largest takes the integer that reaches furthest
    errors = problem.error(best, problem.levels(best))
    for bound in (low + 1, high):
        best, errors = _best(problem, best, rounded(largest / bound, wanted), errors)
    for _ in range(_ROUNDS):
        levels = problem.levels(best)
        assert best.scales is not None
        integers = (best.scales.float() - kind.scale_zero).unflatten(1, wanted.shape[1:])[..., None]
        steps = integers * levels
        power = (problem.weigh * steps.square()).sum(dim=(-1, -2))
        d = (problem.weigh * steps * problem.weight).sum(dim=(-1, -2)) / power.clamp(min=_TINY)
        d = torch.where(power > 0, d, best.d.float())
        best, errors = _best(problem, best, replace_d(kind, best, d, None), errors)
        levels = problem.levels(best)
        own = (problem.weigh * levels * problem.weight).sum(-1) / (problem.weigh * levels.square()).sum(-1).clamp(
            min=_TINY
        )
        best, errors = _best(problem, best, rounded(best.d.float(), own), errors)
    return best


def replace_d(kind: BlockType, found: BlockScales, d_RB: Tensor, dmin_RB: Tensor | None) -> BlockScales:
    """The same integers with other d (and dmin)."""
    return made(kind, d_RB.half(), found.scales, None if dmin_RB is None else dmin_RB.half(), found.minima)


def _with_minimum(problem: _Problem, scale_RG: Tensor, offset_RG: Tensor) -> BlockScales:
    """Q2_K, Q4_K, Q5_K: integers from 0 on for both; what is subtracted is never negative."""
    kind = problem.kind
    most, n = (1 << kind.scale_bits) - 1, kind.columns // kind.group
    scale, lowered = scale_RG.unflatten(1, (-1, n)), (-offset_RG).clamp(min=0).unflatten(1, (-1, n))

    def rounded(d_RB: Tensor, dmin_RB: Tensor, scale_RBn: Tensor, lowered_RBn: Tensor) -> BlockScales:
        half, half_min = d_RB.half(), dmin_RB.half()

        def integers(wanted: Tensor, of: Tensor) -> Tensor:
            step = torch.where(of == 0, torch.ones_like(of), of).float()[..., None]
            return (wanted / step).round().clamp(0, most).to(torch.uint8).flatten(1)

        return made(kind, half, integers(scale_RBn, half), half_min, integers(lowered_RBn, half_min))

    best = rounded(scale.amax(-1) / most, lowered.amax(-1) / most, scale, lowered)
    errors = problem.error(best, problem.levels(best))
    for _ in range(_ROUNDS):
        best, errors = _best(problem, best, _both_fitted(problem, best), errors)
        levels = problem.levels(best)
        own_scale, own_lowered = _group_fit(problem, levels)
        assert best.dmin is not None
        best, errors = _best(problem, best, rounded(best.d.float(), best.dmin.float(), own_scale, own_lowered), errors)
        wider = own_scale.amax(-1) / most, own_lowered.amax(-1) / most
        best, errors = _best(problem, best, rounded(*wider, own_scale, own_lowered), errors)
    return best


def _both_fitted(problem: _Problem, found: BlockScales) -> BlockScales:
    """Least squares for d and dmin, with integers and codes as they are."""
    kind, n = problem.kind, problem.kind.columns // problem.kind.group
    assert found.scales is not None
    assert found.minima is not None
    assert found.dmin is not None
    up = found.scales.float().unflatten(1, (-1, n))[..., None] * problem.levels(found)
    down = -found.minima.float().unflatten(1, (-1, n))[..., None].expand_as(up)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (problem.weigh * left * right).sum(dim=(-1, -2))

    uu, ud, dd = product(up, up), product(up, down), product(down, down)
    ux, dx = product(up, problem.weight), product(down, problem.weight)
    whole = uu * dd - ud * ud
    sound = whole > 1e-6 * uu * dd
    safe = torch.where(sound, whole, torch.ones_like(whole))
    d = torch.where(sound, (ux * dd - dx * ud) / safe, ux / uu.clamp(min=_TINY))
    dmin = torch.where(sound, (dx * uu - ux * ud) / safe, torch.zeros_like(dx))
    usable = (d > 0) & (dmin >= 0)
    d, dmin = torch.where(usable, d, found.d.float()), torch.where(usable, dmin, found.dmin.float())
    return replace_d(kind, found, d, dmin)


def _group_fit(problem: _Problem, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Each group's own scale and what is subtracted, [R, B, n], by least squares; neither is negative."""
    weigh, weight = problem.weigh, problem.weight
    total = weigh.sum(-1).clamp(min=_TINY)
    level, mean = (weigh * levels).sum(-1) / total, (weigh * weight).sum(-1) / total
    power = (weigh * levels.square()).sum(-1) - total * level.square()
    common = (weigh * levels * weight).sum(-1) - total * level * mean
    scale = torch.where(power > 0, common / power.clamp(min=_TINY), torch.zeros_like(common)).clamp(min=0)
    lowered = scale * level - mean
    through = (weigh * levels * weight).sum(-1) / (weigh * levels.square()).sum(-1).clamp(min=_TINY)
    above = lowered < 0  # a minimum above 0 can not be stored
    return torch.where(above, through.clamp(min=0), scale), lowered.clamp(min=0)
