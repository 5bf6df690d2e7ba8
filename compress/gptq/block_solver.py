"""GPTQ on GGUF's grids: scales and minima are searched first, then codes are solved for what they make of each group.

A group's minimum is taken off the weights beforehand, so that the solver never knows of it. Scales are those that the
file will hold, d times an integer in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.compress.gptq.block_scales import BlockScales, grid_of, made, search_blocks, stored_codes
from moepress.compress.gptq.descent import quadratic
from moepress.compress.gptq.minimum import spread
from moepress.compress.gptq.options import Lattice, SolverOptions, Task
from moepress.compress.gptq.parts import side_by_side
from moepress.compress.gptq.solver import Solved, solve_fixed
from moepress.compress.gptq.two_sided import Sides
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.blocks import Blocks, values
from moepress.runs.phases import phase


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCoded:
    """A quantized matrix in one of GGUF's types, on the CPU."""

    kind: BlockType
    blocks: Blocks

    @property
    def codes(self) -> Tensor:
        """[O, I] uint8."""
        return self.blocks.codes

    def dense(self, device: torch.device | None = None) -> Tensor:
        """What it stands for, [O, I] fp32."""
        return values(self.kind, self.blocks).to(device or "cpu")

    def rows(self, rows: slice) -> "BlockCoded":
        """Some of its rows."""
        held = self.blocks

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return BlockCoded(
            kind=self.kind,
            blocks=Blocks(
                codes=held.codes[rows],
                d=held.d[rows],
                scales=cut(held.scales),
                dmin=cut(held.dmin),
                minima=cut(held.minima),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedBlocks:
    """A batch on one grid.

    Attributes:
        kind: the block type.
        solved: the solver's codes and figures; its scales are products.
        scales: of every matrix.
    """

    kind: BlockType
    solved: Solved
    scales: tuple[BlockScales, ...]

    def matrix(self, index: int) -> BlockCoded:
        """One matrix of the batch."""
        codes = stored_codes(self.kind, self.solved.codes[index].cpu())
        return BlockCoded(kind=self.kind, blocks=self.scales[index].blocks(codes))


def solve_blocks(
    weight_EOI: Tensor, hessian_EII: Tensor, kind: BlockType, options: SolverOptions, sides: Sides = None
) -> SolvedBlocks:
    """Quantize a batch of matrices on a grid of GGUF.

    Args:
        weight_EOI: fp32.
        hessian_EII: as of `solver.solve`.
        kind: the block type.
        options: of the solver; a refit moves scales among those that the type has.
        sides: as of `solver.solve`.
    """
    with phase("scales"):
        scales = _searched(kind, weight_EOI, hessian_EII)
    grid = replace(grid_of(kind), minimum=False)
    plain = replace(options, scale_search=False)
    device = weight_EOI.device  # scales are searched on the CPU
    lattice = _lattice(kind, scales, device) if kind.scale_bits else None
    dtype = torch.float32 if kind.scale_bits else torch.float16
    task = Task(grid=grid, group=kind.group, dtype=dtype, options=plain, lattice=lattice)
    above_EOI = weight_EOI
    if scales[0].offset is not None:
        above_EOI = torch.stack(
            [
                w - spread(one.offset.to(device), kind.group)
                for w, one in zip(weight_EOI, scales, strict=True)
                if one.offset is not None
            ]
        )
    solved = solve_fixed(above_EOI, hessian_EII, torch.stack([one.scale for one in scales]).to(device), task, sides)
    if above_EOI is not weight_EOI:
        energy_E = quadratic(weight_EOI.mT, hessian_EII).sum(dim=1).clamp(min=0)
        solved = replace(solved, energy=energy_E)
    refitted = tuple(_with_scales(kind, *one) for one in zip(scales, solved.scales.cpu(), strict=True))
    return SolvedBlocks(kind=kind, solved=solved, scales=refitted)


def _lattice(kind: BlockType, scales: Sequence[BlockScales], device: torch.device) -> Lattice:
    """What scales may be: each block's d times the integers of the type."""
    groups = kind.columns // kind.group
    step_EOG = torch.stack([one.d.float().repeat_interleave(groups, dim=1) for one in scales]).to(device)
    least = -kind.scale_zero if kind.scale_zero else 0
    return Lattice(step=step_EOG, least=least, most=(1 << kind.scale_bits) - 1 - kind.scale_zero)


def _with_scales(kind: BlockType, before: BlockScales, scale_OG: Tensor) -> BlockScales:
    """The same with the scales that the solver has left, as d or as integers."""
    if not kind.scale_bits:
        return made(kind, scale_OG.half(), None, before.dmin, None)
    assert before.scales is not None
    groups = kind.columns // kind.group
    step_OG = before.d.float().repeat_interleave(groups, dim=1)
    integers = (scale_OG / torch.where(step_OG == 0, torch.ones_like(step_OG), step_OG)).round() + kind.scale_zero
    kept = (step_OG == 0) | (scale_OG == before.scale)  # such as a group whose scale is 0
    return made(kind, before.d, torch.where(kept, before.scales, integers.to(torch.uint8)), before.dmin, before.minima)


def _searched(kind: BlockType, weight_EOI: Tensor, hessian_EII: Tensor) -> list[BlockScales]:
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2).clamp(min=0)
    given = list(zip(weight_EOI.cpu(), importance_EI.cpu(), strict=True))
    with side_by_side(min(len(given), torch.get_num_threads())) as each:
        return each(lambda one: search_blocks(kind, one[0], one[1]), given)


def rounded_blocks(kind: BlockType, weight_OI: Tensor) -> BlockCoded:
    """A matrix that sees no tokens, such as embeddings, rounded to nearest on the best scales."""
    found: list[BlockCoded] = []
    for part in weight_OI.split(4096):
        scales = search_blocks(kind, part.float(), torch.ones(part.shape[1]))
        above = part.float() if scales.offset is None else part.float() - spread(scales.offset, kind.group)
        grid = grid_of(kind)
        levels = grid.nearest(above.unflatten(1, (-1, kind.group)) / scales.scale[..., None]).flatten(1)
        found.append(BlockCoded(kind=kind, blocks=scales.blocks(stored_codes(kind, grid.codes(levels)))))
    return joined(found)


def joined(parts: Sequence[BlockCoded]) -> BlockCoded:
    """Rows of several as one matrix."""

    def whole(name: str) -> Tensor | None:
        held = [getattr(part.blocks, name) for part in parts]
        return None if held[0] is None else torch.cat(held)

    codes, d = whole("codes"), whole("d")
    assert codes is not None
    assert d is not None
    more = {name: whole(name) for name in ("scales", "dmin", "minima")}
    return BlockCoded(kind=parts[0].kind, blocks=Blocks(codes=codes, d=d, **more))
