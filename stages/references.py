"""References: what was kept of a model's predictions as one side of a comparison, and what a new one is of."""

from datetime import UTC, datetime
from pathlib import Path

from moepress import __version__
from moepress.calibration.corpus import EvaluationCorpus
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.shown import subject_info
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.reference_file import About, SavedReference, tokenizer_digest
from moepress.validation.quality.results import Quality
from moepress.validation.report.schema import Environment


def saved_subject(label: str, saved: SavedReference) -> Subject:
    """What was kept of a model as the first side of a comparison."""
    about = saved.about
    return Subject(
        label=label,
        source=saved,
        folder=None,
        stored_bytes=about.stored_bytes,
        parameters=about.parameters,
        parts=about.parts,
    )


def require_same(first: Subject, corpus: EvaluationCorpus, tokenizer: Path) -> None:
    """Refuse other windows than those that a reference was made on, where the first subject is one.

    Raises:
        InvalidInputError: they are others.
    """
    if isinstance(first.source, SavedReference):
        first.source.require_same(corpus, tokenizer_digest(load_tokenizer(tokenizer)))


def about_of(
    first: Subject, quality: Quality, tokenizer: Path, *, max_windows: int | None, context: int, machine: Environment
) -> About:
    """What a reference is of.

    Args:
        first: the model.
        quality: as it was measured.
        tokenizer: folder of the tokenizer.
        max_windows: that were asked for.
        context: tokens that the model was made for.
        machine: whose versions it names.
    """
    info = subject_info(first)
    return About(
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=info.folder,
        runtime=quality.runtimes[first.label],
        versions=machine.versions,
        digest=quality.digest,
        tokenizer=tokenizer_digest(load_tokenizer(tokenizer)),
        vocabulary=quality.vocabulary,
        window=quality.window,
        windows=quality.windows,
        max_windows=max_windows,
        domains=quality.domains,
        embedded=quality.embedded,
        context=context,
        stored_bytes=info.stored_bytes,
        parameters=info.parameters,
        parts=info.parts,
        experts_per_layer=info.experts_per_layer,
    )
