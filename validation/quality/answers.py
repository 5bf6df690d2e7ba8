"""Answers of several models to the same prompts, each in its own runtime: how many of them loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moepress.calibration.questions import Prompts
from moepress.models.forward.dense import free_memory_bytes, load_dense, release_dense
from moepress.models.forward.inventory import cache_bytes
from moepress.runs.progress import track
from moepress.validation.quality.batched import MOST, MOST_ON_GPU, seeded, write_batched
from moepress.validation.quality.decoding import Sampling, generate
from moepress.validation.quality.generation import Example, Generation, answer_of, answer_rows, telling
from moepress.validation.quality.measure import Elsewhere, Subject
from moepress.validation.quality.reference_file import SavedReference
from moepress.validation.quality.samples import decoders_elsewhere, require_room, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How prompts are answered.

    Attributes:
        max_new_tokens: at most so many.
        stop: end tokens, those of the first model for all.
        sampling: how tokens are chosen; draws of each prompt have a seed of their own.
    """

    max_new_tokens: int
    stop: frozenset[int]
    sampling: Sampling


def compare_answers(
    subjects: Sequence[Subject],
    prompts: Prompts,
    wanted: Wanted,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    onnx_device: str = "auto",
) -> Generation:
    """Let each model answer all prompts, and count answers that loop or do not end.

    The models are in memory one after the other.

    Args:
        subjects: the reference first.
        prompts: those that leave room for an answer of full length in every model's context.
        wanted: how they are answered.
        tokenizer: a transformers tokenizer, to show a few answers.
        device: of models that run in torch.
        dtype: of their weights in memory.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX folders.

    Raises:
        MoepressError: a model does not fit into memory, or can not be run.
        InvalidInputError: a model gives NaN.
    """
    written: list[list[list[int]]] = []
    for subject in subjects:
        require_room(subject, device, dtype, "to answer prompts")
        with track(f"{subject.label}: answers", len(prompts.ids), unit="prompts") as advance:
            written.append(_answers(subject, prompts.ids, wanted, device, dtype, onnx_device, advance))
        release_dense(device)
    labels = [subject.label for subject in subjects]
    shown = next((n for n in reversed(range(len(subjects))) if not isinstance(subjects[n].source, Elsewhere)), 0)
    shown = shown or len(subjects) - 1
    return Generation(
        prompts=len(prompts.ids),
        source=prompts.source,
        digest=prompts.digest,
        chat=prompts.chat,
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.sampling.temperature,
        seed=wanted.sampling.seed,
        rows=answer_rows(labels, written, wanted.stop),
        examples=tuple(
            Example(
                prompt=prompts.texts[number],
                answers=tuple(
                    answer_of(
                        labels[n],
                        written[n][number],
                        text_of(tokenizer, prompts.ids[number], written[n][number]),
                        wanted.stop,
                    )
                    for n in (0, shown)
                ),
            )
            for number in (telling(written[0], written[shown], wanted.stop) if len(subjects) > 1 else ())
        ),
    )


def _answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    device: torch.device,
    dtype: torch.dtype,
    onnx_device: str,
    advance: Callable[[int], None],
) -> list[list[int]]:
    tokens = max(map(len, prompts)) + wanted.max_new_tokens
    limit, stop, sampling = wanted.max_new_tokens, wanted.stop, wanted.sampling
    if not isinstance(subject.source, Elsewhere):
        assert not isinstance(subject.source, SavedReference), "who saves predictions alone answers nothing"
        model = load_dense(subject.source, device=device, dtype=dtype)
        caches = max(1, cache_bytes(subject.source.config, tokens) * dtype.itemsize // 2)
        together = max(1, min(MOST if device.type == "cpu" else MOST_ON_GPU, free_memory_bytes(device) // 4 // caches))
        return write_batched(
            model,
            prompts,
            max_new_tokens=limit,
            stop=stop,
            sampling=sampling,
            together=together,
            advance=advance,
        )
    fresh, answers = decoders_elsewhere(subject.source, onnx_device, tokens), list[list[int]]()
    for number, ids in enumerate(prompts):
        own = seeded(sampling, number)
        answers.append(list(generate(fresh(), ids, max_new_tokens=limit, stop=stop, sampling=own)))
        advance(1)
    return answers
