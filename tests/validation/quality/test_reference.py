"""A saved reference: what it is exact in, what is a bound, and what is no reference at all."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stage_runs import command
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.errors import InvalidInputError
from moepress.validation.quality.divergence import token_kl
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.reference import coarse_kl, keep_top
from moepress.validation.quality.reference_file import About, Keeper, SavedReference, read_reference, write_reference
from moepress.validation.quality.results import Quality

SHORT = ("--max-windows", "1", "--no-throughput")


def distributions(rows: int, vocabulary: int, seed: int) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocabulary, generator=drawn)).log_softmax(dim=1)


def by_hand(before: Tensor, after: Tensor, top: int) -> list[float]:
    """KL of the coarse distributions, from probabilities."""
    found = []
    for p, q in zip(before.double().exp(), after.double().exp(), strict=True):
        ids = p.topk(top).indices
        one = torch.cat([p[ids], (1 - p[ids].sum())[None]])
        other = torch.cat([q[ids], (1 - q[ids].sum())[None]])
        found.append(float((one * (one / other).log()).sum()))
    return found


@pytest.mark.parametrize("top", [1, 5, 20])
def test_the_bound_is_the_divergence_of_the_coarser_distributions(top: int) -> None:
    before, after = distributions(9, 50, 1), distributions(9, 50, 2)
    kept = keep_top(before, torch.zeros(9, dtype=torch.int64), top)
    forward, reverse = coarse_kl(kept, after)
    assert forward.tolist() == pytest.approx(by_hand(before, after, top), rel=1e-4)
    full, full_reverse = token_kl(before, after), token_kl(after, before)
    assert bool((forward <= full + 1e-6).all())
    assert bool((reverse <= full_reverse + 1e-6).all())
    assert bool((forward > 0).all())


def test_more_tokens_bound_it_more_closely_and_all_of_them_are_exact() -> None:
    before, after = distributions(9, 50, 1), distributions(9, 50, 2)
    wanted = torch.zeros(9, dtype=torch.int64)
    means = [float(coarse_kl(keep_top(before, wanted, top), after)[0].mean()) for top in (1, 4, 16, 49, 50, 64)]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(float(token_kl(before, after).mean()), rel=1e-5)
    assert keep_top(before, wanted, 64).ids.shape == (9, 50)


def test_the_same_model_has_no_divergence_at_all() -> None:
    before = distributions(9, 50, 1)
    for top in (4, 50):
        forward, reverse = coarse_kl(keep_top(before, torch.zeros(9, dtype=torch.int64), top), before)
        assert forward.tolist() == reverse.tolist() == [0.0] * 9


def about(corpus: EvaluationCorpus, **changes: Any) -> About:
    windows, length = corpus.windows.shape
    values = {
        "tool_version": "0.1.0",
        "created": "2026-11-23T13:40:00+00:00",
        "model": "demo",
        "runtime": "torch",
        "versions": {},
        "digest": corpus.digest,
        "tokenizer": "ab",
        "vocabulary": 2048,
        "window": length,
        "windows": windows,
        "max_windows": 2,
        "domains": corpus.domains,
        "embedded": True,
        "context": 512,
        "stored_bytes": 9,
        "parameters": 4,
    }
    return About.model_validate(values | changes)


@pytest.fixture(scope="module")
def saved(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path_factory: pytest.TempPathFactory
) -> SavedReference:
    """What is kept of the demo, as a file that was written and read."""
    folder, keeper = tmp_path_factory.mktemp("saved"), Keeper(16)
    run(subjects[:1], corpus, folder, seen=keeper)
    write_reference(folder / "ref.safetensors", keeper.kept(), about(corpus))
    return read_reference(folder / "ref.safetensors")


def run(subjects: Sequence[Subject], corpus: EvaluationCorpus, folder: Path, seen: Any = None) -> Quality:
    from moepress.models.forward.walk import Limits

    limits = Limits(memory_bytes=1 << 30, batch_windows=8)
    here = {"device": torch.device("cpu"), "dtype": torch.float32}
    return measure(subjects, corpus, limits=limits, scratch_folder=folder, seen=seen, **here)


def test_all_but_the_divergences_is_exact_and_these_are_bounds(
    saved: SavedReference, subjects: Sequence[Subject], corpus: EvaluationCorpus, quality: Quality, tmp_path: Path
) -> None:
    first = Subject(label="demo", source=saved, folder=None, stored_bytes=9, parameters=4)
    found = run([first, *subjects[1:]], corpus, tmp_path)
    assert [row.nll for row in found.rows if row.subject == "demo"] == [
        row.nll for row in quality.rows if row.subject == "demo"
    ]
    for row, full in zip(found.rows, quality.rows, strict=True):
        assert (row.subject, row.domain, row.bits_per_byte) == (full.subject, full.domain, full.bits_per_byte)
        if row.paired is None or full.paired is None:
            continue
        for name in ("delta_nll", "perplexity_ratio", "same_top1", "same_top5", "rms_delta_p"):
            assert getattr(row.paired, name) == getattr(full.paired, name), name
        assert row.paired.reverse_kl is not None
        assert full.paired.reverse_kl is not None
        assert row.paired.tail is not None
        assert full.paired.tail is not None
        if row.subject == "copy":
            assert (row.paired.kl.value, row.paired.reverse_kl.value, row.paired.tail.largest) == (0, 0, 0)
        else:
            assert 0.5 * full.paired.kl.value < row.paired.kl.value < full.paired.kl.value
            assert row.paired.reverse_kl.value < full.paired.reverse_kl.value
            assert row.paired.tail.largest <= full.paired.tail.largest
    assert found.saved is not None
    assert (found.saved.top, found.saved.file) == (16, "ref.safetensors")
    assert 0 < found.saved.rest < 1
    assert found.routing == (), "nothing is kept of routers"
    assert any("lower bounds" in note for note in found.notes)


def test_other_windows_are_refused_with_what_to_give(saved: SavedReference, corpus: EvaluationCorpus) -> None:
    saved.require_same(corpus, "other")
    other = dataclasses.replace(corpus, digest="0" * 64)
    with pytest.raises(
        InvalidInputError, match=r"was made on other text: 8 windows of 32 tokens .*give the same --data"
    ):
        saved.require_same(other, "ab")
    with pytest.raises(InvalidInputError, match="the tokenizer of this model is another one, too"):
        saved.require_same(other, "cd")


def test_another_vocabulary_is_refused(
    saved: SavedReference, subjects: Sequence[Subject], corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    other = dataclasses.replace(saved, about=saved.about.model_copy(update={"vocabulary": 4096}))
    first = Subject(label="demo", source=other, folder=None, stored_bytes=9, parameters=4)
    with pytest.raises(InvalidInputError, match="demo has a vocabulary of 4096 and pruned one of 2048"):
        run([first, subjects[2]], corpus, tmp_path)


def spoiled(saved: SavedReference, folder: Path, **changes: Any) -> Path:
    """The file with other tensors or another description."""
    tensors = load_file(saved.file)
    with safe_open(str(saved.file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    for name, change in changes.items():
        if name == "about":
            metadata["about"] = json.dumps(json.loads(metadata["about"]) | change)
        elif name in tensors:
            tensors[name] = change(tensors[name].clone())
        else:
            metadata[name] = change
    save_file(tensors, folder / "bad.safetensors", metadata=metadata)
    return folder / "bad.safetensors"


def put(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "something else"}, "is no reference of moepress; give a file made with --save-reference"),
        ({"about": {"schema_version": "2.0"}}, "schema_version"),
        ({"about": {"windows": 7}}, "its tensors are not those that belong there"),
        ({"about": {"vocabulary": 100}}, "are no tokens of a vocabulary of 100"),
        ({"about": {"surprise": 1}}, "surprise"),
        ({"ids": lambda tensor: tensor.long()}, "its tensors are not those that belong there"),
        ({"top5": put(-1)}, "its top5 are no tokens"),
        ({"nll": put(float("nan"))}, "no log-probabilities"),
        ({"nll": put(-3.0)}, "no log-probabilities"),
        ({"rest": put(2.0)}, "no log-probabilities"),
        ({"log_probabilities": put(float("nan"))}, "no log-probabilities"),
    ],
)
def test_a_spoiled_file_is_refused(saved: SavedReference, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        read_reference(spoiled(saved, tmp_path, **changes))


def test_names_in_a_file_are_nothing_that_a_terminal_obeys(saved: SavedReference, tmp_path: Path) -> None:
    found = read_reference(spoiled(saved, tmp_path, about={"model": "x\x1b[2Jy", "domains": ["a\nb"]}))
    assert found.about.model is not None
    assert "\x1b" not in found.about.model
    assert "\n" not in found.about.domains[0]


def test_random_damage_is_noticed_or_harmless(saved: SavedReference, tmp_path: Path) -> None:
    data, drawn, refused = saved.file.read_bytes(), random.Random(0), 0
    head = 8 + int.from_bytes(data[:8], "little")
    for number in range(150):
        place = drawn.randrange(head if number % 2 else len(data))
        file = tmp_path / "damaged"
        file.write_bytes(data[:place] + bytes([drawn.randrange(256)]) + data[place + 1 :])
        try:
            read_reference(file)
        except InvalidInputError:
            refused += 1
    assert refused > 30


def test_what_is_cut_off_or_no_such_file_is_refused(saved: SavedReference, tmp_path: Path) -> None:
    data = saved.file.read_bytes()
    for name, content in (("cut", data[:-7]), ("empty", b""), ("text", b"not a reference at all"), ("head", data[:60])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInputError, match=name):
            read_reference(tmp_path / name)
    with pytest.raises(InvalidInputError, match="Cannot read"):
        read_reference(tmp_path / "nowhere")


def test_the_command_saves_one_and_compares_with_it(tmp_path: Path) -> None:
    file, out = tmp_path / "ref.safetensors", tmp_path / "report"
    code, printed, errors = command("validate", "demo", "--save-reference", str(file), *SHORT)
    assert code == 0, errors
    assert "perplexity" in printed
    assert read_reference(file).about.max_windows == 1
    again = ("validate", "demo", "--reference", str(file), "--no-throughput", "--max-kl", "0.01", "-o", str(out))
    code, printed, errors = command(*again)  # windows are those of the file
    assert code == 0, errors
    assert "KL divergence, at least" in printed
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["quality"]["saved"]["model"] == "demo"
    assert len(report["quality"]["saved"]["sha256"]) == 64
    assert [subject["label"] for subject in report["subjects"]] == ["before", "after"]
    assert report["subjects"][0]["stored_bytes"] == report["subjects"][1]["stored_bytes"]
    assert report["quality"]["rows"][-1]["paired"]["kl"]["value"] == 0
    assert report["thresholds"][0]["state"] == "kept"
    assert "KL divergence, at least" in (out / "report.md").read_text(encoding="utf-8")
    code, _, errors = command("validate", "demo", "--save-reference", str(file), *SHORT)
    assert code == 2
    assert "is there already" in errors
    code, _, errors = command("validate", "demo", "--reference", str(file), "--no-throughput", "--max-windows", "2")
    assert code == 4
    assert "was made on other text" in errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("demo",), "Give AFTER"),
        (("demo", "demo", "--reference", "x"), "--reference takes the place of BEFORE"),
        (("demo", "--reference", "x", "--save-reference", "y"), "--save-reference"),
    ],
)
def test_one_model_is_compared_with_something(options: tuple[str, ...], said: str) -> None:
    code, printed, errors = command("validate", *options, *SHORT)
    assert (code, printed) == (2, "")
    assert said in errors
