"""Numbers of the streamed measurement against brute force with transformers' whole demo model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moepress.calibration.corpus import EvaluationCorpus
from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.outline import outline_of
from moepress.validation.quality.measure import Subject, hidden_pass, measure
from moepress.validation.quality.results import ALL_WINDOWS, DOMAIN_MEAN, Quality
from moepress.validation.quality.scores import score_tokens


def run(subjects: Sequence[Subject], corpus: EvaluationCorpus, folder: Path, memory_bytes: int = 1 << 30) -> Quality:
    limits = Limits(memory_bytes=memory_bytes, batch_windows=8)
    return measure(
        subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=folder
    )


@pytest.fixture(scope="module")
def whole_logits(demo_folder: Path, corpus: EvaluationCorpus) -> torch.Tensor:
    """fp32 [N, T, V] of transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(corpus.windows).logits
    return logits


def test_nll_of_every_domain_is_that_of_transformers_logits(
    quality: Quality, corpus: EvaluationCorpus, whole_logits: torch.Tensor
) -> None:
    for place, domain in enumerate(corpus.domains):
        inside = (corpus.domain_index == place).nonzero().flatten().tolist()
        losses = [
            torch.nn.functional.cross_entropy(whole_logits[w, :-1], corpus.windows[w, 1:]).double() for w in inside
        ]
        means = torch.stack(losses)
        row = quality.row("demo", domain)
        assert row.nll.value == pytest.approx(float(means.mean()), rel=1e-5)
        assert row.nll.error == pytest.approx(float(means.std()) / len(inside) ** 0.5, rel=1e-3)
        assert row.perplexity.value == pytest.approx(float(means.mean().exp()), rel=1e-4)
        assert (row.windows, row.tokens) == (len(inside), len(inside) * 31)
        bits = float(means.sum()) * 31 / 0.6931471805599453
        assert row.bits_per_byte == pytest.approx(bits / int(corpus.window_bytes[inside].sum()), rel=1e-5)


def test_an_identical_subject_has_no_divergence_at_all(quality: Quality) -> None:
    for domain in (*quality.domains, ALL_WINDOWS, DOMAIN_MEAN):
        against = quality.row("copy", domain).paired
        assert against is not None
        assert (against.kl.value, against.kl.error) == (0, 0)
        assert (against.same_top1.value, against.same_top1.error) == (1, 0)
        assert against.tail is not None
        assert against.tail.largest == 0
        assert [found and found.value for found in (against.same_top5, against.reverse_kl, against.rms_delta_p)] == [
            1,
            0,
            0,
        ]
        assert (against.delta_nll.value, against.perplexity_ratio.value) == (0, 1)
        assert quality.row("copy", domain).nll == quality.row("demo", domain).nll


def test_a_pruned_subject_diverges_and_is_worse(quality: Quality) -> None:
    against = quality.row("pruned").paired
    assert against is not None
    assert against.kl.value > 0.01
    assert 0.2 < against.same_top1.value < 0.99
    assert against.delta_nll.value > 0
    ratio = quality.row("pruned").perplexity.value / quality.row("demo").perplexity.value
    assert against.perplexity_ratio.value == pytest.approx(ratio)
    assert (against.delta_nll.error or 9) < (quality.row("demo").nll.error or 0)


def test_the_reference_is_not_paired_and_every_cut_is_there(quality: Quality) -> None:
    assert [row.paired is None for row in quality.rows] == [True] * 6 + [False] * 12
    assert [row.domain for row in quality.rows[:6]] == [*quality.domains, ALL_WINDOWS, DOMAIN_MEAN]
    assert (quality.windows, quality.tokens, quality.window) == (8, 8 * 31, 32)


def test_the_size_of_a_chunk_changes_nothing_but_the_last_bits(
    whole_logits: torch.Tensor, corpus: EvaluationCorpus
) -> None:
    before = hidden_pass(whole_logits, lambda logits: logits, "")
    after = hidden_pass(whole_logits * 0.9, lambda logits: logits, "")
    whole = score_tokens(after, before, corpus.windows)
    for logits_bytes in (1, 200_000):
        part = score_tokens(after, before, corpus.windows, logits_bytes=logits_bytes)
        torch.testing.assert_close(whole.nll, part.nll, rtol=1e-5, atol=1e-6)
        assert whole.against is not None
        assert part.against is not None
        for name in ("before", "after", "kl", "reverse", "same", "common"):
            one, other = (getattr(scores.against, name) for scores in (whole, part))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_buffers_on_disk_give_the_same_numbers_and_are_removed(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, quality: Quality, tmp_path: Path
) -> None:
    again = run((subjects[0], subjects[2]), corpus, tmp_path / "new", memory_bytes=1000)
    assert again.row("pruned") == quality.row("pruned")
    assert list((tmp_path / "new").iterdir()) == []


def test_vocabularies_of_different_sizes_are_refused(
    demo: Checkpoint, subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    config = {**demo.config, "vocab_size": 4096}
    wider = dataclasses.replace(demo, config=config, outline=outline_of(demo.family, config, demo.shapes))
    other = dataclasses.replace(subjects[0], label="wider", source=wider)
    with pytest.raises(InvalidInputError, match=r"demo has a vocabulary of 2048 and wider one of 4096"):
        run((subjects[0], other), corpus, tmp_path)


def test_two_subjects_of_one_name_are_refused(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="different names"):
        run((subjects[0], subjects[0]), corpus, tmp_path)
    with pytest.raises(UsageError, match="none"):
        run((), corpus, tmp_path)


def test_nan_logits_are_refused(subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path: Path) -> None:
    class Broken:
        def __init__(self, base: Checkpoint) -> None:
            self.config, self.family, self.outline, self.shapes = base.config, base.family, base.outline, base.shapes
            self.read_row = base.read_row
            self.base = base

        def read(self, name: str) -> torch.Tensor:
            return self.base.read(name) * (torch.nan if name == "lm_head.weight" else 1)

    base = subjects[0].source
    assert isinstance(base, Checkpoint)
    with pytest.raises(InvalidInputError, match="broken gives NaN"):
        run((dataclasses.replace(subjects[0], label="broken", source=Broken(base)),), corpus, tmp_path)
