"""What models are compared on: the text, its windows, and all else that is asked of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.sources import Source as TextSource
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.stages.answers import Answering, asked
from moepress.stages.groundwork import load_tokenizer, require_context
from moepress.stages.places import DEFAULT_WINDOW
from moepress.stages.tasks import TaskRequest
from moepress.validation.quality.thresholds import Thresholds

EMBEDDED_TOKENS = 8192  # per domain; the embedded Python is longer than the prose


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What models are compared on.

    Attributes:
        data: files, folders or data sets; none at all means the embedded evaluation text.
        domains: NAME=PATH.
        window: tokens per window; None for the reference's context, at most 2048.
        max_windows: windows per domain; None for all (of the embedded text, for 8192 tokens).
        throughput: also time prefill and decode, and let the models write sample text.
        context: tokens in the KV cache of the table of GPUs; None for 8192, or the context where it is shorter.
        targets_file: the user's own GPUs, beside those of the table.
        target: the GPU that the user aims at, as `target_of` takes it.
        thresholds: limits that are judged.
        tasks: what the models are asked besides, with a limit of its own; None: nothing.
        answering: what the models are to answer; None: nothing.
    """

    data: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    window: int | None = None
    max_windows: int | None = None
    throughput: bool = True
    context: int | None = None
    targets_file: Path | None = None
    target: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    tasks: TaskRequest | None = None
    answering: Answering | None = None


def load_evaluation(
    folder: Path, data: Sequence[str], domains: Sequence[str], *, window: int, max_windows: int | None, vocabulary: int
) -> EvaluationCorpus:
    """Tokenized evaluation windows; without data the embedded evaluation text, as much of every domain."""
    sources = parse_sources(data, domains)
    if not sources:
        sources, max_windows = embedded_sources("evaluation"), max_windows or max(1, EMBEDDED_TOKENS // window)
    return evaluation_windows(
        sources, load_tokenizer(folder), window=window, max_windows=max_windows, vocab_size=vocabulary
    )


def evaluation_sources(evaluation: Evaluation) -> tuple[TextSource, ...]:
    """Where the text is from."""
    return parse_sources(evaluation.data, evaluation.domains) or embedded_sources("evaluation")


def evaluation_corpus(folder: Path, evaluation: Evaluation, *, context: int, vocabulary: int) -> EvaluationCorpus:
    """The windows that an evaluation describes, for a model of that context and vocabulary, tokenizer in `folder`."""
    require_context("--window", evaluation.window, context)
    return load_evaluation(
        folder,
        evaluation.data,
        evaluation.domains,
        window=evaluation.window or min(context, DEFAULT_WINDOW),
        max_windows=evaluation.max_windows,
        vocabulary=vocabulary,
    )


def check_evaluation(folder: Path, evaluation: Evaluation, *, context: int, vocabulary: int) -> tuple[str, str | None]:
    """Refuse text and prompts that can not be used, before any work.

    Returns:
        Digests of the windows and of the prompts, where there are some.
    """
    corpus = evaluation_corpus(folder, evaluation, context=context, vocabulary=vocabulary)
    if evaluation.answering is None:
        return corpus.digest, None
    found = asked(
        evaluation.answering,
        folder,
        load_tokenizer(folder),
        evaluation_sources(evaluation),
        corpus,
        context=context,
        vocabulary=vocabulary,
    )
    return corpus.digest, found.prompts.digest
