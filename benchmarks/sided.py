"""`quantize` with what `ends` found in its loss: the stages are as they are, and the solver is called through here.

While `sided` is open, each solve is handed the factors of its matrices, and Hessians are formed with their token
weights. For schemes, and Linears that are solved in one pass (`steps_fit`), which is enough for the models of the
benchmarks.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from ends import Ends, Key
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, Moments, moments
from moepress.compress.gptq import experts, linears, pipeline
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.include import LinearGroup
from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.walk import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What is added to the loss of a matrix.

    Attributes:
        end: times the factor of the network's end in B, whose mean diagonal is then that.
        routers: times the routers' factor in B.
        writers_only: the routers' factor only for matrices that write into the residual stream.
        floor: times the identity in B.
        power: of the token weights of the network's end; 0 for none.
    """

    end: float = 0.0
    routers: float = 0.0
    writers_only: bool = True
    floor: float = 0.1
    power: float = 0.0


@dataclass(slots=True)
class _Walk:
    """Where the walk is: the keys that are solved next and those after them, and how many tokens a Linear has seen."""

    loss: Loss
    end: Ends
    routers: Ends
    keys: list[list[Key]] = field(default_factory=list)
    tokens: int = 0

    def side(self, key: Key) -> Tensor | None:
        """B, or None where rows are independent."""
        writes = any(name.endswith(("o_proj.weight", "down_proj.weight")) for name in key)
        parts = [(self.loss.end, self.end)]
        if writes or not self.loss.writers_only:
            parts.append((self.loss.routers, self.routers))
        found = [(share, ends.side(key, 0.0)) for share, ends in parts if share]
        sides = [share * side_OO for share, side_OO in found if side_OO is not None]
        if not sides:
            return None
        return torch.stack(sides).sum(dim=0) + self.loss.floor * torch.eye(len(sides[0]))

    def weights(self, key: Key) -> Tensor | None:
        """a_t [T] of all tokens."""
        return self.end.weights(key, self.loss.power) if self.loss.power else None


@contextmanager
def sided(loss: Loss, end: Ends, routers: Ends) -> Generator[None]:
    """Quantize with that loss; `Loss(floor=...)` alone changes nothing."""
    walk = _Walk(loss=loss, end=end, routers=routers)
    solve_stack = linears._solve_stack
    solve_experts, solve_stepping = pipeline.solve_experts, pipeline.solve_stepping

    def by_sides(weight_EOI: Tensor, hessian_EII: Tensor, scheme: Scheme, **options: Any) -> Solved:
        assert options.pop("sides", None) is None, "quantize has sides of its own"
        keys = walk.keys.pop(0)
        assert len(keys) == len(weight_EOI), "the walk and the keys went apart"
        found = [walk.side(key) for key in keys]
        given = [None if side_OO is None else (side_OO,) for side_OO in found]
        return solve(weight_EOI, hessian_EII, scheme, sides=given, **options)

    def of_experts(stream: Stream, layer: int, weights: Mapping[int, Any], *rest: Any) -> Any:
        names = [stream.model.family.expert_names(layer, expert) for expert in weights]
        walk.keys = [[tuple(own[:-1]) for own in names], [tuple(own[-1:]) for own in names]]
        return solve_experts(stream, layer, weights, *rest)

    def token_weights(stream: Stream, position: tuple[Tensor, Tensor], options: HessianOptions) -> Tensor | None:
        if not walk.loss.power or not len(position[0]):
            return None
        expert = int(stream.chosen[position[0][0], position[1][0]])
        layer = stream.model.family.layer_of(walk.keys[0][0][0])
        assert layer is not None
        names = stream.model.family.expert_names(layer, expert)
        weights_T = walk.weights(tuple(names[:-1]) if len(walk.keys) == 2 else tuple(names[-1:]))
        return None if weights_T is None else weights_T[position[0]]

    def stepping(
        stream: Stream, options: QuantizeOptions, layer: int, groups: Sequence[LinearGroup], *rest: Any
    ) -> Any:
        walk.keys, walk.tokens = [[group.names] for group in groups], 0
        return solve_stepping(stream, options, layer, groups, *rest)

    def weighed(inputs_TI: Tensor, originals_TI: Tensor | None = None) -> Moments:
        rows = slice(walk.tokens, walk.tokens + len(inputs_TI))
        walk.tokens = rows.stop
        weights_T = walk.weights(walk.keys[0][0])
        return moments(inputs_TI, originals_TI, None if weights_T is None else weights_T[rows])

    def of_group(*given: Any) -> Any:
        walk.tokens = 0
        return solve_stack(*given)

    with (
        patch.object(experts, "solve", by_sides),
        patch.object(linears, "moments", weighed),
        patch.object(linears, "_solve_stack", of_group),
        patch.object(experts, "token_weights", token_weights),
        patch.object(pipeline, "solve_experts", of_experts),
        patch.object(pipeline, "solve_stepping", stepping),
    ):
        yield
