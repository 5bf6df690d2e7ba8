"""What `validate` and `run` let models answer: prompts are read and checked before any work, answers come later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moepress.calibration.corpus import Corpus
from moepress.calibration.questions import Prompts, file_prompts, text_prompts
from moepress.calibration.sources import Source
from moepress.errors import MoepressError, UsageError
from moepress.validation.quality.answers import Wanted, compare_answers
from moepress.validation.quality.decoding import Sampling, check_prompt, stop_tokens
from moepress.validation.quality.generation import RECOMMENDED, Generation
from moepress.validation.quality.looping import LEAST_TOKENS
from moepress.validation.quality.measure import Subject

LEAST_NEW_TOKENS, MAX_NEW_TOKENS = 2 * LEAST_TOKENS, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """What is to be answered.

    Attributes:
        count: prompts; None: all of `files`.
        files: of prompts; none at all: of the evaluation text.
        max_new_tokens: limit of an answer's length.
        sampling: how tokens are chosen.
    """

    count: int | None = None
    files: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Prompts and how they are answered, checked; notes are for the report."""

    prompts: Prompts
    wanted: Wanted
    notes: tuple[str, ...]


def asked(
    answering: Answering,
    folder: Path,
    tokenizer: Any,
    sources: Sequence[Source],
    corpus: Corpus,
    *,
    context: int,
    vocabulary: int,
) -> Asked:
    """The prompts, of which those are left out that leave no room for an answer.

    Args:
        answering: what is wanted.
        folder: with the files of the tokenizer, and what states the end tokens.
        tokenizer: a transformers tokenizer.
        sources: of the evaluation text.
        corpus: its windows.
        context: the shortest of the models'.
        vocabulary: of the models.

    Raises:
        UsageError: no prompt leaves room for an answer.
        InvalidInputError: a file can not be read or holds no prompt, or a token is none of the model's.
    """
    if answering.files:
        found = file_prompts([Path(file).expanduser() for file in answering.files], tokenizer, answering.count)
    else:
        found = text_prompts(sources, corpus, tokenizer, answering.count or RECOMMENDED)
    longest, limit = context - answering.max_new_tokens, answering.max_new_tokens
    kept = [number for number, ids in enumerate(found.ids) if len(ids) <= longest]
    if not kept:
        raise UsageError(
            f"--max-new-tokens {limit} leaves no room for a prompt in the context of {context} tokens (the shortest "
            f"prompt has {min(map(len, found.ids))}); give a smaller number, or shorter prompts."
        )
    for number in kept:
        check_prompt(found.ids[number], context=context, vocabulary=vocabulary)
    notes = list(found.notes)
    if len(kept) < len(found.ids):
        notes.append(
            f"{len(found.ids) - len(kept)} prompts are too long for an answer of {limit} tokens and were left out."
        )
    stop = stop_tokens(folder, tokenizer)
    if not stop:
        notes.append("The model names no end token, so that every answer runs to the limit of its length.")
    texts, ids = zip(*((found.texts[number], found.ids[number]) for number in kept), strict=True)
    return Asked(
        prompts=replace(found, texts=texts, ids=ids),
        wanted=Wanted(max_new_tokens=limit, stop=stop, sampling=answering.sampling),
        notes=tuple(f"Answers: {note}" for note in notes),
    )


def answering_of(values: Mapping[str, Any]) -> Answering | None:
    """What options or a recipe's fields ask for; None where they ask for nothing.

    A limit on loops alone asks for as many prompts as it takes to hold it.
    """
    files, count = tuple(values["prompts"]), values["generations"]
    if count is None and not files and values["max_loop_increase"] is None:
        return None
    return Answering(
        count=count if files else count or RECOMMENDED,
        files=files,
        max_new_tokens=values["max_new_tokens"],
        sampling=Sampling(temperature=values["temperature"], seed=values["generation_seed"]),
    )


def answers_section(
    subjects: Sequence[Subject],
    to_answer: Asked,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    onnx_device: str,
) -> Generation:
    """What all models answer.

    Raises:
        MoepressError: a model does not fit into memory.
    """
    try:
        return compare_answers(
            subjects,
            to_answer.prompts,
            to_answer.wanted,
            tokenizer,
            device=device,
            dtype=dtype,
            onnx_device=onnx_device,
        )
    except torch.OutOfMemoryError as error:
        raise MoepressError(
            f"The device ({device}) ran out of memory while prompts were answered; use --device cpu, shorter answers "
            "(--max-new-tokens), or leave --generations out."
        ) from error
