"""Answers to many prompts from a transformers model in memory, several at a time; tokens as one at a time.

Letters: B prompts that are answered together, T tokens of the longest, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from moepress.errors import InvalidInputError
from moepress.validation.quality.decoding import Sampling, choose

MOST = 64  # prompts together on a CPU, whose batches soon cost what their tokens cost
MOST_ON_GPU = 256
_SAME = 0.1  # of the logits' spread: 16 bit rounding is far below, a prompt that sees its padding far above


def write_batched(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    sampling: Sampling,
    together: int = MOST,
    advance: Callable[[int], None] = lambda _count: None,
) -> list[list[int]]:
    """What the model answers to each prompt, as `decoding.generate` would: with the end token, or of full length.

    transformers' own `generate` writes, with the prompts padded on the left; a model whose code does not pass over
    padding (transformers' MiniMax) is found by trying, and gets prompts of one length together. Tokens are drawn for
    each prompt from a generator of its own, seeded with the seed plus the prompt's number, so that it does not matter
    which prompts are answered together.

    Args:
        model: a causal language model in eval mode, such as `load_dense` gives.
        prompts: token numbers; none is empty, and all leave room for an answer of full length.
        max_new_tokens: at most so many.
        stop: end tokens.
        sampling: how tokens are chosen.
        together: prompts that are answered at the same time.
        advance: is told how many are done.

    Raises:
        InvalidInputError: the model gives NaN.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for numbers in _batches(prompts, together, pads=_passes_over_padding(model, prompts)):
        chosen = _Chosen(sampling, numbers)
        made = _generate(model, [prompts[number] for number in numbers], max_new_tokens, stop, chosen)
        for number, row in zip(numbers, made.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in stop), len(row) - 1)
            answers[number] = row[: end + 1]
        advance(len(numbers))
    return answers


def _batches(prompts: Sequence[Sequence[int]], together: int, *, pads: bool) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together: of nearly one length, or of one."""
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    kinds = [by_length] if pads else [list(k) for _, k in groupby(by_length, lambda number: len(prompts[number]))]
    for kind in kinds:
        yield from (kind[start : start + together] for start in range(0, len(kind), together))


def _passes_over_padding(model: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the shortest prompt has the same logits alone and padded to the length of the longest."""
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if len(shortest) == len(longest):
        return True
    tokens_BT, mask_BT = _padded([shortest, longest])
    given = {"attention_mask": mask_BT}
    if "position_ids" in signature(model.forward).parameters:  # as `generate` gives them
        given["position_ids"] = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        beside = {name: tensor.to(model.device) for name, tensor in given.items()}
        padded = model(tokens_BT.to(model.device), logits_to_keep=1, **beside).logits[0, -1]
        alone = model(torch.tensor([list(shortest)] * 2).to(model.device), logits_to_keep=1).logits[0, -1]
    apart, spread = (padded - alone).float().square().mean().sqrt(), alone.float().std()
    return bool(apart < _SAME * spread)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens, padded on the left, and the mask of those that are real: int64 [B, T] each."""
    longest = max(map(len, prompts))
    tokens = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(tokens), torch.tensor(mask)


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], room: int, stop: frozenset[int], chosen: Callable[..., Tensor]
) -> Tensor:
    """New tokens int64 [B, at most room] on the CPU; behind an end token stands anything."""
    from transformers import GenerationConfig, LogitsProcessorList

    tokens_BT, mask_BT = _padded(prompts)
    config = GenerationConfig(
        max_new_tokens=room, do_sample=False, use_cache=True, eos_token_id=sorted(stop) or None, pad_token_id=0
    )
    model.generation_config = config  # what a checkpoint or an old config states of penalties and draws is not for us
    with torch.inference_mode():
        made: Tensor = model.generate(
            tokens_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([chosen]),
        )
    return made[:, tokens_BT.shape[1] :].cpu()


class _Chosen:
    """Leaves each prompt's next token alone with a finite logit, so that the greedy choice takes it.

    Args:
        sampling: how tokens are chosen.
        numbers: of the prompts, for their seeds.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self._sampling = sampling
        self._draws = [torch.Generator().manual_seed(seeded(sampling, number).seed) for number in numbers]

    def __call__(self, _tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """See transformers' `LogitsProcessor`."""
        if not self._sampling.temperature:
            if not bool(torch.isfinite(logits_BV.amax(dim=1)).all()):
                raise InvalidInputError("The model gives NaN or Inf logits; use --dtype float32, or make it again.")
            return logits_BV
        rows = logits_BV.float().cpu()
        tokens = [choose(row, self._sampling, draws) for row, draws in zip(rows, self._draws, strict=True)]
        only = torch.full_like(logits_BV, -torch.inf)
        only[range(len(tokens)), tokens] = 0.0
        return only


def seeded(sampling: Sampling, number: int) -> Sampling:
    """The sampling of one of many prompts: a seed of its own."""
    return replace(sampling, seed=(sampling.seed + number) % (1 << 63)) if sampling.temperature else sampling
