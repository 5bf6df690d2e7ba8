"""calibration make: a model answers prompts to their end, and what it says, with its reasoning, is calibration text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moepress.calibration.endpoint import Answer, Endpoint, ask
from moepress.calibration.prompts import Prompt, read_prompts
from moepress.calibration.reasoning import split_reasoning
from moepress.calibration.records import Conversation
from moepress.calibration.templates import ChatTemplate, Refused
from moepress.calibration.traces import check_traces, open_traces
from moepress.errors import InvalidInputError, MoepressError
from moepress.runs.progress import note, track
from moepress.stages.generate import open_model
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import Machine, model_place
from moepress.validation.quality.decoding import (
    Decoder,
    Sampling,
    check_prompt,
    generate,
    stop_tokens,
    why_stopped,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        model: a folder or file, `demo`, an id on the hub; of an endpoint the name that its server knows.
        prompts: file of prompts.
        output: file of answers.
        endpoint: a server that runs the model; None loads it here.
        max_new_tokens: of an answer, reasoning included.
        sampling: how tokens are chosen; every prompt has a seed of its own made of this one.
    """

    model: str
    prompts: Path
    output: Path
    endpoint: Endpoint | None
    max_new_tokens: int
    sampling: Sampling

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on; stands in every line."""
        sampling = self.sampling
        return {
            "model": self.model,
            "max_new_tokens": self.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What came of it.

    Attributes:
        file: the answers.
        prompts: how many there are.
        before: of them answered by an earlier run.
        answers, tokens: new ones.
        cut: new answers that the limit, or the context, cut off.
        reasoned: new answers with reasoning.
        as_text: new answers that are lines of text: there is no chat template, or it would leave reasoning out.
    """

    file: str
    prompts: int
    before: int
    answers: int
    tokens: int
    cut: int
    reasoned: int
    as_text: int


Answerer = Callable[[Prompt], Answer]


def make_stage(request: Request, machine: Machine) -> Made:
    """Answer all prompts that have no answer yet; each one is on the disk when the next begins.

    Raises:
        UsageError: no prompts, a prompt that leaves no room, or a file of answers that is not of this run.
        InvalidInputError: prompts, model or tokenizer are not sound.
        MoepressError: the server can not be reached, or memory has no room.
    """
    prompts = read_prompts(request.prompts)
    found, texts = list[Answer](), 0
    check_traces(request.output, request.settings)
    with _answerer(request, machine) as answer, open_traces(request.output, request.settings) as traces:
        todo = [prompt for prompt in prompts if prompt.key not in traces.done]
        before = len(prompts) - len(todo)
        with track("answer", len(prompts), unit="prompts") as advance:
            advance(before)
            for prompt in todo:
                said = answer(prompt)
                as_text = isinstance(answer, _Local) and answer.as_text(prompt, said)
                traces.add(prompt, said, as_text=as_text)
                found.append(said)
                texts += as_text
                advance(1, "" if said.tokens is None else f"{said.tokens:,} tokens")
        if texts and isinstance(answer, _Local) and answer.has_template:
            note(
                f"{texts} answers are lines of text as the model saw it, for its chat template would leave their "
                "reasoning out."
            )
    return Made(
        file=str(request.output),
        prompts=len(prompts),
        before=before,
        answers=len(found),
        tokens=sum(said.tokens or 0 for said in found),
        cut=sum(said.stopped != "end" for said in found),
        reasoned=sum(bool(said.reasoning) for said in found),
        as_text=texts,
    )


@contextmanager
def _answerer(request: Request, machine: Machine) -> Iterator[Answerer]:
    if request.endpoint is not None:
        yield _of_endpoint(request)
        return
    local = _Local(request, machine)
    try:
        yield local
    finally:
        local.close()


def _of_endpoint(request: Request) -> Answerer:
    endpoint, sampling = request.endpoint, request.sampling
    assert endpoint is not None
    fixed: dict[str, Any] = {
        "model": request.model,
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
    }
    fixed |= {} if sampling.top_p is None else {"top_p": sampling.top_p}
    fixed |= {} if sampling.top_k is None else {"top_k": sampling.top_k}  # vLLM, SGLang and llama.cpp have it

    def answer(prompt: Prompt) -> Answer:
        # Servers take seeds of 32 bits.
        return ask(endpoint, {**fixed, "messages": prompt.messages, "seed": prompt.seed(sampling.seed) % (1 << 31)})

    return answer


class _Local:
    """A model in this process, in the runtime of its folder, with its own chat template where it has one."""

    def __init__(self, request: Request, machine: Machine) -> None:
        place = model_place(request.model)
        self._request = request
        self._model = open_model(place, machine)
        self._tokenizer = load_tokenizer(place)
        self._stop = stop_tokens(place, self._tokenizer)
        self._template = ChatTemplate(self._tokenizer)
        self._fresh: Callable[[], Decoder] | None = None
        self._special = tuple(map(str, getattr(self._tokenizer, "all_special_tokens", ())))
        if not self._template.there:
            note(
                f"{request.model} has no chat template: it goes on from each prompt as from any text, and lines hold "
                "text."
            )

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._template.there

    def __call__(self, prompt: Prompt) -> Answer:
        """Let the model answer."""
        text = self._written(prompt.messages)
        ids = list(self._tokenizer(text, add_special_tokens=not self._template.there)["input_ids"])
        check_prompt(ids, context=self._model.context, vocabulary=self._model.vocabulary)
        limit, request = self._request.max_new_tokens, self._request
        try:
            if self._fresh is None:
                self._fresh = self._model.load()
            sampling = replace(request.sampling, seed=prompt.seed(request.sampling.seed))
            new = list(generate(self._fresh(), ids, max_new_tokens=limit, stop=self._stop, sampling=sampling))
        except torch.OutOfMemoryError as error:
            raise MoepressError(
                f"The device ({self._model.device}) ran out of memory; give a smaller --max-new-tokens, or --device "
                "cpu."
            ) from error
        stopped = why_stopped(new, max_new_tokens=limit, stop=self._stop)
        said = new[:-1] if stopped == "end" else new
        raw = self._decoded([*ids, *said])[len(self._decoded(ids)) :]
        reasoning, content = split_reasoning(raw, text, self._special)
        whole = self._without_bos(text) + self._decoded([*ids, *new])[len(self._decoded(ids)) :]
        return Answer(content=content, reasoning=reasoning, stopped=stopped, tokens=len(new), text=whole)

    def as_text(self, prompt: Prompt, said: Answer) -> bool:
        """Whether a conversation would not be written as the model saw it: no template, or one that drops reasoning."""
        if not self._template.there:
            return True
        if not said.reasoning:
            return False
        turn = {"role": "assistant", "reasoning_content": said.reasoning, "content": said.content}
        (text,) = self._template.render([Conversation(messages=[*prompt.messages, turn])])
        return isinstance(text, Refused) or said.reasoning.strip() not in text

    def _written(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt as the model is given it."""
        if not self._template.there:
            return "\n\n".join(str(message["content"]) for message in messages)
        asked = Conversation(messages=[dict(message) for message in messages])
        (text,) = self._template.render([asked], add_generation_prompt=True)
        if isinstance(text, Refused):
            raise InvalidInputError(f"The tokenizer's chat template refuses a prompt ({text.reason}); mend it.")
        return text

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _without_bos(self, text: str) -> str:
        """Tokenizers that put it before a text would put a second one there."""
        mark = getattr(self._tokenizer, "bos_token", None)
        return text.removeprefix(str(mark)) if mark else text

    def close(self) -> None:
        """End the template's process."""
        self._template.close()
