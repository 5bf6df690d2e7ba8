"""Text from a model, token by token: a decoding loop of our own, so that every runtime is driven in the same way.

Letters: B batch (always 1), S new tokens of a step, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moepress.errors import InvalidInputError, UsageError
from moepress.models.storage.folder import read_json


class Decoder(Protocol):
    """A model that remembers what it was given: one sequence, from its start."""

    @property
    def context(self) -> int:
        """Tokens that one sequence may have."""

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""

    def step(self, tokens_BS: Tensor) -> Tensor:
        """Append tokens to the sequence.

        Args:
            tokens_BS: the new ones, int64 [1, S] on the CPU; the whole prompt at first, then one at a time.

        Returns:
            Logits for the token that comes next, fp32 [1, V] on the CPU.
        """


class TorchDecoder:
    """A transformers model as a `Decoder`; its KV cache begins empty.

    Args:
        model: a causal language model in eval mode, such as `load_dense` gives.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.context = int(config.max_position_embeddings)
        self.vocabulary = int(config.vocab_size)
        self._model, self._cache = model, None

    def step(self, tokens_BS: Tensor) -> Tensor:
        """See `Decoder.step`."""
        with torch.inference_mode():
            tokens = tokens_BS.to(self._model.device)
            output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            logits: Tensor = output.logits[:, -1].float().cpu()
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest tokens only (those as likely as the k-th stay too).
        top_p: draw among the fewest likeliest tokens whose probabilities add up to it; applied after top_k.
        seed: of the draws.

    Raises:
        UsageError: a value is outside of its range, or top_k or top_p are given without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature} is not possible; give 0 (no sampling) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k {self.top_k} leaves no token to draw; give 1 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is not a share of probability; give more than 0 and at most 1.")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} is not possible; give a number from 0 to 2^63 - 1.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError("--top-k and --top-p need sampling; add --temperature, for example 0.8.")


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from, fp64 [V]; temperature, then top_k, then top_p, as in transformers.

    The temperature must be above 0.
    """
    logits = logits_V.double()
    scaled = (logits - logits.max()) / sampling.temperature  # at most 0, so that no temperature is too small
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        least = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    shares = scaled.softmax(0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        behind = ordered.cumsum(0) - ordered >= sampling.top_p  # what stands before it is enough already
        shares = shares.index_fill(0, order[behind], 0.0)
        shares = shares / shares.sum()
    return shares


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits_V: floating point [V].
        sampling: how.
        generator: source of chance, on the CPU; untouched at temperature 0.

    Raises:
        InvalidInputError: the logits are no numbers.
    """
    if not bool(torch.isfinite(logits_V.max())):  # the maximum is NaN where any of them is
        raise InvalidInputError("The model gives NaN or Inf logits; use --dtype float32, or make the model again.")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))


def check_prompt(prompt_ids: Sequence[int], *, context: int, vocabulary: int) -> None:
    """Refuse a prompt that a model cannot go on from.

    Raises:
        UsageError: it is empty, or leaves no room in the context.
        InvalidInputError: it has tokens that the model does not know.
    """
    if not prompt_ids:
        raise UsageError("The prompt is empty; give some text to go on from.")
    if len(prompt_ids) >= context:
        raise UsageError(
            f"The prompt has {len(prompt_ids)} tokens and the model's context has room for {context}, the answer "
            "included; give a shorter one."
        )
    if max(prompt_ids) >= vocabulary:
        raise InvalidInputError(
            f"The tokenizer gives token id {max(prompt_ids)}, but the model's vocabulary has {vocabulary} entries; "
            "put the tokenizer files that belong to this model into its folder."
        )


def generate(
    decoder: Decoder, prompt_ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int], sampling: Sampling
) -> Iterator[int]:
    """New tokens, one by one, until a token of `stop` (which is the last one given), the limit, or a full context.

    Args:
        decoder: with nothing in its cache.
        prompt_ids: what to go on from.
        max_new_tokens: at most so many.
        stop: end-of-text tokens.
        sampling: how tokens are chosen.

    Raises:
        UsageError, InvalidInputError: see `check_prompt` (at once) and `choose` (while it runs).
    """
    check_prompt(prompt_ids, context=decoder.context, vocabulary=decoder.vocabulary)
    room = min(max_new_tokens, decoder.context - len(prompt_ids))
    return _steps(decoder, torch.tensor([list(prompt_ids)]), room, stop, sampling)


def _steps(decoder: Decoder, tokens_BS: Tensor, room: int, stop: frozenset[int], sampling: Sampling) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(room):
        token = choose(decoder.step(tokens_BS)[0], sampling, generator)
        yield token
        if token in stop:
            return
        tokens_BS = torch.tensor([[token]])


def why_stopped(new_ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int]) -> str:
    """Why `generate` came to its end: `end` of text, `length` (the limit), or `context` (it is full)."""
    if new_ids and new_ids[-1] in stop:
        return "end"
    return "length" if len(new_ids) >= max_new_tokens else "context"


def stop_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """End-of-text tokens: of generation_config.json, else of config.json, else of the tokenizer, as in transformers.

    Raises:
        InvalidInputError: a file states something else than token numbers.
    """
    for name in ("generation_config.json", "config.json") if folder.is_dir() else ():
        file = folder / name
        stated = read_json(file).get("eos_token_id") if file.is_file() else None
        if stated is not None:
            return _numbers(stated, file)
    found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset({int(found)})


def _numbers(stated: Any, file: Path) -> frozenset[int]:
    numbers = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise InvalidInputError(f"{file}: eos_token_id is {stated!r}, which is no token number; mend or restore it.")
    return frozenset(numbers)


class TextStream:
    """Tokens to text, piece by piece: what comes out is whole characters, and all of it is the text of all tokens.

    A token is decoded together with those before it, for a tokenizer may treat the first token of a text in its own way
    (no leading space); characters of several tokens wait until they are complete.

    Args:
        tokenizer: a transformers tokenizer.
        before: the tokens that the text goes on from; they are not printed.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._known, self._new = list(before), list[int]()

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._new.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):  # a character that is not complete yet, or bytes that are none
            return ""
        self._known, self._new = self._new, []
        return text

    def flush(self) -> str:
        """What is left at the end, with a replacement character for bytes that are none."""
        text, self._new = self._pending(), []
        return text

    def _pending(self) -> str:
        return self._decoded([*self._known, *self._new])[len(self._decoded(self._known)) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
