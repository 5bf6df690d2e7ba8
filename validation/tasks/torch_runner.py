"""A model of transformers as a `Runner`: many inputs at a time, padded to one length where the model does not mind.

Behind an input a causal model does not look, and padding before a prompt is masked; a few families look all the same
(attention that is linear or compressed goes by blocks from the first position). So the loaded model is asked before,
with two inputs together and alone; where that is not the same, inputs of one length alone go together.

Letters: B batch, S tokens of the longest input, K positions that are kept, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moepress.models.forward.dense import release_dense
from moepress.validation.tasks.runner import Ended, Input

_BATCH_TOKENS = 4096  # of inputs that go through together
_BATCH_LOGITS = 1 << 28  # bytes of their logits
_BATCH_PROMPTS = 8  # that are written on together
_PROBE_TOKENS = 300  # of the longer of two inputs that tell whether padding is seen; the other has a third
_SAME = {torch.float32: 1e-3}  # of the largest logit; padding that is seen changes it by a tenth and more
_SAME_ROUNDED = 0.05  # in 16 bits, where other shapes have other sums


class TorchRunner:
    """A model of transformers.

    Args:
        model: a causal language model in eval mode, such as `load_dense` gives.
        device: where it lies.
        dtype: of its weights.
    """

    def __init__(self, model: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        config = model.config.get_text_config()
        self._model, self._device, self._dtype = model, device, dtype
        self._vocabulary, self._context = int(config.vocab_size), int(config.max_position_embeddings)
        self.runtime = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')} on {device}"

    def logits(self, inputs: Sequence[Input]) -> Iterator[Tensor]:
        """See `Runner.logits`."""
        start = 0
        while start < len(inputs):
            batch = inputs[start : start + self._fitting(inputs[start:])]
            yield from self._batch(batch)
            start += len(batch)

    def _fitting(self, inputs: Sequence[Input]) -> int:
        """How many of the first inputs go together."""
        longest, first = 0, inputs[0].first
        for count, one in enumerate(inputs, start=1):
            longest, first = max(longest, len(one.tokens)), min(first, one.first)
            logits_bytes = count * (longest - first) * self._vocabulary * 4
            full = count * longest > _BATCH_TOKENS or logits_bytes > _BATCH_LOGITS
            other = len(one.tokens) != len(inputs[0].tokens)
            if count > 1 and (full or (other and not self._takes_padding_behind)):
                return count - 1
        return len(inputs)

    def _batch(self, batch: Sequence[Input]) -> Iterator[Tensor]:
        longest = max(len(one.tokens) for one in batch)
        kept = longest - min(one.first for one in batch)
        tokens_BS = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, one in enumerate(batch):
            tokens_BS[row, : len(one.tokens)] = torch.tensor(one.tokens)
        with torch.inference_mode():
            made = self._model(tokens_BS.to(self._device), use_cache=False, logits_to_keep=kept)
            logits_BKV = made.logits.float().cpu()
        skipped = longest - kept
        for row, one in enumerate(batch):
            yield logits_BKV[row, one.first - skipped : len(one.tokens) - skipped]

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        """See `Runner.greedy`."""
        start = 0
        while start < len(prompts):
            batch = list(prompts[start : start + _BATCH_PROMPTS])
            if len({len(prompt) for prompt in batch}) > 1 and not self._takes_padding_before:
                batch = batch[: next(n for n, prompt in enumerate(batch) if len(prompt) != len(batch[0]))]
            made, longest = self._generate(batch, room, stop, ended), max(map(len, batch))
            for new in made.sequences[:, longest:].tolist():
                yield _until_end(new, stop, ended)
            start += len(batch)

    def _generate(
        self, prompts: Sequence[Sequence[int]], room: int, stop: frozenset[int], ended: Ended, *, logits: bool = False
    ) -> Any:
        """transformers' own loop, on prompts padded before, under a mask."""
        from transformers import GenerationConfig

        longest, padding = max(map(len, prompts)), min(stop, default=0)
        tokens_BS = torch.full((len(prompts), longest), padding, dtype=torch.int64)
        mask_BS = torch.zeros_like(tokens_BS)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask_BS[row, longest - len(prompt) :] = 1

        def all_ended(seen_BS: Tensor, _scores: Any, **_: Any) -> Tensor:
            new = seen_BS[:, longest:].tolist()
            return torch.tensor([ended(one) for one in new], device=seen_BS.device)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            eos_token_id=sorted(stop) or None,
            pad_token_id=padding,
            return_dict_in_generate=True,
            output_logits=logits,
        )
        with torch.inference_mode():
            return self._model.generate(
                tokens_BS.to(self._device),
                attention_mask=mask_BS.to(self._device),
                generation_config=config,
                stopping_criteria=[all_ended],
            )

    @cached_property
    def _probe(self) -> list[list[int]]:
        longest = min(_PROBE_TOKENS, self._context - 2)
        tokens = torch.randint(self._vocabulary, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
        return [tokens, tokens[: max(2, longest // 3)]]

    @cached_property
    def _takes_padding_behind(self) -> bool:
        def last(inputs: Sequence[Sequence[int]]) -> Tensor:
            return torch.cat(list(self._batch([Input(tokens=tuple(one), first=len(one) - 1) for one in inputs])))

        return self._alike(last)

    @cached_property
    def _takes_padding_before(self) -> bool:
        def first_two(prompts: Sequence[Sequence[int]]) -> Tensor:
            made = self._generate(prompts, 2, frozenset(), lambda _new: False, logits=True)
            return torch.stack(made.logits, dim=1).float().cpu()

        return self._alike(first_two)

    def _alike(self, asked: Callable[[Sequence[Sequence[int]]], Tensor]) -> bool:
        """Whether the shorter of two inputs gives the same beside a longer one and alone."""
        beside, alone = asked(self._probe)[-1], asked(self._probe[-1:])[-1]
        return bool((beside - alone).abs().max() <= _SAME.get(self._dtype, _SAME_ROUNDED) * alone.abs().max())

    def close(self) -> None:
        """See `Runner.close`."""
        self._model = None
        release_dense(self._device)


def _until_end(new: list[int], stop: frozenset[int], ended: Ended) -> list[int]:
    """Without what was written while others of a batch went on."""
    kept: list[int] = []
    for token in new:
        kept.append(token)
        if token in stop or ended(kept):
            break
    return kept
