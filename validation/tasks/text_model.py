"""A loaded model and a tokenizer as what tasks ask of a model: how likely a text is after another, and what follows it.

Texts are split as lm-evaluation-harness splits them for transformers' models (`HFLM`, `TemplateLM._encode_pair`), so
that scores are comparable: spaces at a context's end belong to what follows, and both are tokenized together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.records import Conversation
from moepress.calibration.templates import ChatTemplate, Refused
from moepress.errors import InvalidInputError, UsageError
from moepress.runs.progress import track
from moepress.validation.tasks.runner import Input, Runner, require_finite

_MOST_BYTES = 8  # tokens beyond a stop's own bytes that may be looked at to find it


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How an answer is written: always the likeliest token.

    Attributes:
        until: texts that end it and are not part of it.
        room: tokens at most.
    """

    until: tuple[str, ...] = ()
    room: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A text that is to be scored: its tokens, of which the last `new` count."""

    tokens: tuple[int, ...]
    new: int


class TextModel:
    """Scores and writes text.

    Args:
        label: of the model, for messages.
        runner: the model.
        tokenizer: of transformers.
        longest: tokens of a prompt and what follows it; longer prompts lose their beginning.
        stop: end-of-text tokens.
    """

    def __init__(self, label: str, runner: Runner, tokenizer: Any, *, longest: int, stop: frozenset[int]) -> None:
        self.label, self.tokenizer, self.longest = label, tokenizer, longest
        self._runner, self._stop = runner, stop
        self._template: ChatTemplate | None = None

    @property
    def prefix(self) -> int:
        """The token that stands before a text which has nothing before it."""
        for number in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if number is not None:
                return int(number)
        return min(self._stop, default=0)

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of every (context, continuation): ln p of the continuation, and whether each of its tokens is the likeliest.

        Inputs that differ in their last token alone go through the model once.

        Raises:
            UsageError: a continuation has more tokens than the context holds.
            InvalidInputError: the model gives NaN.
        """
        return self._score([self._cut(*self._pair(*pair)) for pair in pairs], "tasks, choices")

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p of whole texts, each token once; of longer ones a window at a time, with one token before it."""
        windows: list[_Scored] = []
        counts = []
        for text in texts:
            tokens = [self.prefix, *self._encode(text, special=False)]
            step = self.longest - 1
            parts = [tokens[place : place + step + 1] for place in range(0, max(len(tokens) - 1, 1), step)]
            windows += [_Scored(tokens=tuple(part), new=len(part) - 1) for part in parts]
            counts.append(len(parts))
        values = iter(self._score(windows, "tasks, texts"))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def write(self, requests: Sequence[tuple[str, Writing]]) -> list[str]:
        """What follows each context, up to a stop.

        Raises:
            UsageError: an answer may have as many tokens as the context holds.
        """
        made: dict[int, str] = {}
        groups: dict[Writing, list[int]] = {}
        for number, (_, writing) in enumerate(requests):
            groups.setdefault(writing, []).append(number)
        with track(f"{self.label}: tasks, answers", len(requests), unit="answers") as advance:
            for writing, numbers in groups.items():
                if writing.room >= self.longest:
                    raise UsageError(
                        f"A task asks for answers of up to {writing.room} tokens, and the models' context is "
                        f"{self.longest}; leave the task out, or lower its max_gen_toks."
                    )
                prompts = {n: self._prompt(requests[n][0], self.longest - writing.room) for n in numbers}
                order = sorted(numbers, key=lambda n: -len(prompts[n]))
                new = self._runner.greedy(
                    [prompts[n] for n in order], room=writing.room, stop=self._stop, ended=self._ended(writing)
                )
                for number, tokens in zip(order, new, strict=True):
                    made[number] = self._text(tokens, writing.until)
                    advance(1)
        return [made[number] for number in range(len(requests))]

    def chat(self, messages: Sequence[Mapping[str, str]], *, opened: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, up to where the answer begins.

        Args:
            messages: `role` and `content`.
            opened: the answer begins behind them; else the last message is its beginning.

        Raises:
            UsageError: there is no template.
            InvalidInputError: it can not be used.
        """
        before, begun = (messages, "") if opened else (messages[:-1], messages[-1]["content"])
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        if not self._template.there:
            raise UsageError("The model's tokenizer has no chat template; leave --chat out.")
        said = Conversation(messages=[dict(message) for message in before])
        (text,) = self._template.render([said], add_generation_prompt=True)
        if isinstance(text, Refused):
            raise InvalidInputError(f"The tokenizer's chat template can not be used ({text.reason}); leave --chat out.")
        return text + begun

    def close(self) -> None:
        """End the process that runs the chat template."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def _encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Token ids; special tokens as the tokenizer has them, but not a second time where the text names the first."""
        if special is None:
            named = self.tokenizer.bos_token
            special = not (named and text.startswith(named))
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            new = self._encode(continuation, special=False)
            return ([self.prefix], new) if new[:1] != [self.prefix] else (new[:1], new[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return self._pair("", continuation)
        both, before = self._encode(context + continuation), self._encode(context)
        return before, both[len(before) :] or both[-1:]

    def _cut(self, before: Sequence[int], new: Sequence[int]) -> _Scored:
        if len(new) >= self.longest:
            raise UsageError(
                f"A task's choice has {len(new)} tokens, and the models' context is {self.longest}; leave the task out."
            )
        return _Scored(tokens=tuple([*before, *new][-self.longest :]), new=len(new))

    def _prompt(self, context: str, room: int) -> list[int]:
        return (self._encode(context) or [self.prefix])[-room:]

    def _score(self, scored: Sequence[_Scored], title: str) -> list[tuple[float, bool]]:
        shared: dict[tuple[int, ...], list[int]] = {}
        known = {number: (0.0, True) for number, one in enumerate(scored) if not one.new}
        for number, one in enumerate(scored):
            if one.new:
                shared.setdefault(one.tokens[:-1], []).append(number)
        order = sorted(shared, key=lambda tokens: (-len(tokens), tokens))
        inputs = [Input(tokens=t, first=len(t) - max(scored[n].new for n in shared[t])) for t in order]
        with track(f"{self.label}: {title}", len(inputs), unit="texts") as advance:
            for given, logits_RV in zip(inputs, self._runner.logits(inputs), strict=True):
                require_finite(logits_RV, self.label)
                logs_RV = logits_RV.log_softmax(dim=1)
                for number in shared[given.tokens]:
                    known[number] = _likelihood(logs_RV, scored[number])
                advance(1)
        return [known[number] for number in range(len(scored))]

    def _ended(self, writing: Writing) -> Callable[[Sequence[int]], bool]:
        if not any(writing.until):
            return lambda _new: False
        looked = max(len(stop.encode()) for stop in writing.until) + _MOST_BYTES

        def ended(new: Sequence[int]) -> bool:
            text = self._decode(new[-looked:])
            return any(stop in text for stop in writing.until if stop)

        return ended

    def _text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        text = self._decode(tokens)
        for stop in filter(None, until):
            text = text.split(stop, 1)[0]
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _likelihood(logs_RV: Tensor, one: _Scored) -> tuple[float, bool]:
    """From ln p [R, V] of the last R positions to that of the last tokens; R is not below their number."""
    rows = logs_RV[len(logs_RV) - one.new :]
    tokens = torch.tensor(one.tokens[-one.new :])
    likely = rows.gather(1, tokens[:, None])[:, 0]
    return float(likely.double().sum()), bool((rows.argmax(dim=1) == tokens).all())
