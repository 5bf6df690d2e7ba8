import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moepress.validation.quality.measure import Subject
from moepress.validation.quality.results import Throughput
from moepress.validation.speed import throughput
from moepress.validation.speed.throughput import measure_throughput
from moepress.validation.speed.timing import (
    Bench,
    Candidate,
    Loaded,
    Timed,
    lengths,
    paired_ratio,
    summarize,
    time_group,
)

SMALL = Bench(device=torch.device("cpu"), dtype=torch.float32, prompt=8, decode=2)


@pytest.fixture(scope="module")
def measured(subjects: Sequence[Subject], artifact: Path) -> Throughput:
    broken = artifact.with_name("broken")
    broken.mkdir()
    shutil.copy(artifact / "config.json", broken)
    demo = subjects[0]
    others = (
        dataclasses.replace(demo, label="quantized", folder=artifact),
        dataclasses.replace(demo, label="huge", parameters=10**14),
        dataclasses.replace(demo, label="broken", folder=broken),
        subjects[2],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return measure_throughput((demo, *others), SMALL)


def test_the_demo_gives_five_positive_samples_of_each_test(measured: Throughput) -> None:
    rows = [row for row in measured.rows if row.subject == "demo"]
    assert [row.test for row in rows] == ["pp8", "tg2"]
    for row in rows:
        assert len(row.samples) == measured.repetitions == 5
        assert min(row.samples) > 0
        assert row.tokens_per_second == summarize(row.samples)
        assert row.ratio is None


def test_a_compressed_artifact_is_compared_and_said_to_be_dense(measured: Throughput) -> None:
    before, after = ([row for row in measured.rows if row.subject == label] for label in ("demo", "quantized"))
    assert [row.test for row in after] == ["pp8", "tg2"]
    for one, other in zip(before, after, strict=True):
        assert other.ratio == paired_ratio(other.samples, one.samples)
        assert "made dense when loaded" in (other.note or "")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("huge", "not measured: needs 372529.0 GiB"),
        ("broken", "not measured: transformers can not load it"),
        ("pruned", "not measured: it is not a folder on disk"),
    ],
)
def test_what_can_not_be_measured_says_why(measured: Throughput, label: str, reason: str) -> None:
    (row,) = (row for row in measured.rows if row.subject == label)
    assert (row.tokens_per_second, row.samples) == (None, ())
    assert (row.note or "").startswith(reason)


def test_device_threads_and_runtime_are_named(measured: Throughput) -> None:
    assert "cpu" in measured.device
    assert measured.threads == torch.get_num_threads()
    assert {row.runtime.rpartition(".")[0].rpartition(".")[0] for row in measured.rows} == {"transformers 5"}
    assert {(row.provider, row.dtype) for row in measured.rows} == {("CPU", "float32")}


def test_nothing_is_printed_and_settings_are_put_back(measured: Throughput, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    assert measured is not None
    with throughput._quiet():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")


def test_the_loaded_artifact_computes_in_the_dtype_of_the_row(subjects: Sequence[Subject], artifact: Path) -> None:
    with throughput._quiet():
        model = throughput._load(dataclasses.replace(subjects[0], folder=artifact), SMALL)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_gptq_folders_are_refused_because_transformers_would_load_random_experts(
    subjects: Sequence[Subject], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    reason = throughput._obstacle(dataclasses.replace(subjects[0], folder=tmp_path), SMALL)
    assert reason == "transformers can not load GPTQ experts"


def test_models_that_do_not_fit_together_are_timed_one_after_the_other(
    subjects: Sequence[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []

    def fake(group: Sequence[Candidate], _: int) -> list[Timed]:
        groups.append([candidate.subject for candidate in group])
        return [Timed(candidate=c, provider="CPU", samples={"pp8": [1.0, 1.01]}) for c in group]

    monkeypatch.setattr(throughput, "time_group", fake)
    monkeypatch.setattr(throughput, "free_memory_bytes", lambda _: subjects[0].parameters * 4 + 1)
    rows = measure_throughput(subjects[:2], SMALL).rows
    assert groups == [["demo"], ["copy"]]
    assert all("not interleaved" in (row.note or "") for row in rows)
    assert [row.ratio is None for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("context", "expected"), [(4096, (512, 128)), (640, (512, 128)), (512, (384, 128)), (100, (50, 50)), (2, (1, 1))]
)
def test_prompt_and_decode_fit_the_context(context: int, expected: tuple[int, int]) -> None:
    assert lengths(context, 512, 128) == expected


def test_the_ratio_is_fair_to_both_sides() -> None:
    one, other = [1.0, 2.0, 8.0], [2.0, 2.0, 4.0]
    forth, back = paired_ratio(one, other), paired_ratio(other, one)
    assert forth.value * back.value == pytest.approx(1)
    assert forth.value == pytest.approx((1 / 2 * 1 * 2) ** (1 / 3))
    assert forth.error == pytest.approx(math.log(2) / math.sqrt(3))


def candidate(load: Callable[[], Loaded]) -> Candidate:
    return Candidate(subject="a", runtime="R 1.0", provider="CPU", dtype="float32", memory=("cpu", 0), load=load)


def test_noisy_samples_are_called_noisy(subjects: Sequence[Subject]) -> None:
    samples = {"pp8": [1.0, 2.0], "tg2": [1.0, 1.01]}
    one = Timed(candidate=candidate(dict), provider="CPU", samples=samples, notes=("x",))
    rows = throughput._all_rows([one], subjects, [])
    assert [row.note for row in rows] == [f"x; {throughput._NOISY_NOTE}", "x"]


def test_samples_are_taken_in_turn_without_the_warm_up() -> None:
    runs: list[str] = []

    def load(name: str) -> Callable[[], Loaded]:
        return lambda: Loaded(provider="CPU", tests={"pp8": (8, lambda: runs.append(name))})

    timed = time_group([candidate(load("a")), candidate(load("b"))], 2)
    assert runs == ["a", "b", "a", "b", "a", "b"]
    assert [len(one.samples["pp8"]) for one in timed] == [2, 2]


def test_a_model_that_fails_halfway_has_a_reason_and_no_samples() -> None:
    left = [None, None]
    broken = Loaded(provider="CPU", tests={"pp8": (8, lambda: left.pop()), "tg2": (2, dict)})
    sound = Loaded(provider="CPU", tests={"pp8": (8, dict)})
    first, second = time_group([candidate(lambda: broken), candidate(lambda: sound)], 3)
    assert (first.samples, first.reason) == ({}, "it can not run here (pop from empty list)")
    assert (len(second.samples["pp8"]), second.reason) == (3, None)
