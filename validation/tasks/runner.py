"""What tasks need of a loaded model in any runtime: logits behind a prompt, and the likeliest tokens after it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moepress.errors import InvalidInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Tokens, and the first position whose logits are wanted.

    Attributes:
        tokens: at least one.
        first: from here on to the end.
    """

    tokens: tuple[int, ...]
    first: int


Ended = Callable[[Sequence[int]], bool]
"""Whether new tokens are enough."""


class Runner(Protocol):
    """A loaded model."""

    @property
    def runtime(self) -> str:
        """What computes, with its version."""

    def logits(self, inputs: Sequence[Input]) -> Iterator[Tensor]:
        """For each input, in order, fp32 logits [its tokens - first, V] on the CPU."""

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        """For each prompt, in order, the likeliest new tokens.

        Args:
            prompts: none is empty.
            room: new tokens at most.
            stop: end-of-text tokens, which are the last ones given.
            ended: asked after each token.
        """

    def close(self) -> None:
        """Give its memory back."""


def require_finite(logits: Tensor, what: str) -> None:
    """Refuse logits that are no numbers.

    Raises:
        InvalidInputError: naming the model.
    """
    if not bool(torch.isfinite(logits).all()):
        raise InvalidInputError(f"{what} gives NaN or Inf logits; use --dtype float32, or make the model again.")
