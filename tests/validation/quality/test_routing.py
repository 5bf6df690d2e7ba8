"""Changes of routing, against choices that hooks see in transformers' own models and Python's sets compare."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from stage_runs import CPU, keep_of, logits_of, masked, pruned_folder, watched

from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.forward.dense import load_dense
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, Source, SourceView, open_checkpoint
from moepress.models.storage.experts import prune_source, router_disk_names
from moepress.stages.subjects import subject_of
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import Quality, RoutingRow
from moepress.validation.quality.routing import Kept, Routers, chosen_again, kept_in, same_experts

Sets = dict[int, list[set[int]]]
"""Per MoE layer what each token chose."""


def subject(label: str, source: Source, kept: Kept | None = None) -> Subject:
    return Subject(label=label, source=source, folder=None, stored_bytes=1, parameters=1, kept=kept)


def routing(subjects: Sequence[Subject], corpus: EvaluationCorpus, folder: Path, **limits: int) -> list[RoutingRow]:
    found = measure(
        subjects,
        corpus,
        device=CPU,
        dtype=torch.float32,
        limits=Limits(**{"memory_bytes": 1 << 30, "batch_windows": 3, **limits}),
        scratch_folder=folder,
    )
    return list(found.routing)


def chosen_sets(source: Source, corpus: EvaluationCorpus, mask: Mapping[int, Sequence[int]] | None = None) -> Sets:
    """What a transformers model with these weights chooses, of the experts of `mask` alone where it is given."""
    model = load_dense(source, device=CPU, dtype=torch.float32)
    with masked(model, mask or {}), watched(model) as seen:
        logits_of(model, corpus.windows)
    return {layer: [set(chosen) for chosen in row["chosen"].tolist()] for layer, row in seen.items()}


def counted(before: Sets, after: Sets) -> dict[int, float]:
    """The share of tokens whose sets differ, by layer."""
    return {
        layer: sum(one != other for one, other in zip(sets, after[layer], strict=True)) / len(sets)
        for layer, sets in before.items()
    }


def overlap(before: Sets, after: Sets) -> dict[int, float]:
    """The mean of |A and B| / k, by layer."""
    return {
        layer: sum(len(one & other) / len(one) for one, other in zip(sets, after[layer], strict=True)) / len(sets)
        for layer, sets in before.items()
    }


def assert_counted(rows: Sequence[RoutingRow], changed: Mapping[int, float], common: Mapping[int, float]) -> None:
    """Up to two tokens whose choice is so close that the order of a sum decides it."""
    assert [row.layer for row in rows] == [*sorted(changed), None]
    for row in rows[:-1]:
        assert row.layer is not None
        assert row.changed.value == pytest.approx(changed[row.layer], abs=2.5 / row.tokens)
        assert row.common == pytest.approx(common[row.layer], abs=2.5 / row.tokens)
    assert rows[-1].changed.value == pytest.approx(sum(changed.values()) / len(changed), abs=2.5 / rows[-1].tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(SourceView):
    """A source with some tensors, by their names, made by functions of those that were there."""

    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    renamed: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        return self.changes.get(name, lambda tensor: tensor)(self.base.read(self.renamed.get(name, name)))

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self.read(name)[row]


def test_an_equal_model_chooses_alike(quality: Quality, corpus: EvaluationCorpus) -> None:
    rows = [row for row in quality.routing if row.subject == "copy"]
    assert [row.layer for row in rows] == [1, 2, 3, 4, None]
    for row in rows:
        assert (row.changed.value, row.changed.error, row.common) == (0, 0, 1)
        assert row.tokens == corpus.windows.numel() == 8 * 32


def test_quantized_experts_move_the_choices_behind_them(
    demo: Checkpoint, artifact: Path, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    pressed = open_artifact(artifact)
    rows = routing([subject_of("before", demo), subject_of("after", pressed)], corpus, tmp_path)
    before, after = chosen_sets(demo, corpus), chosen_sets(pressed, corpus)
    assert_counted(rows, counted(before, after), overlap(before, after))
    assert rows[0].changed.value == 0, "nothing before the first router has changed"
    assert all(0 < row.changed.value < 0.5 for row in rows[1:])
    assert all(0.8 < (row.common or 0) < 1 for row in rows[1:])


def test_a_router_with_other_rows_shows_in_its_layer_alone(
    demo: Checkpoint, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    weight = next(name for name in router_disk_names(demo, 4) if name.endswith("weight"))
    spoiled = Changed(base=demo, changes={weight: lambda rows: rows.roll(1, dims=0)}, renamed={})
    rows = routing([subject("before", demo), subject("after", spoiled)], corpus, tmp_path)
    before, after = chosen_sets(demo, corpus), chosen_sets(spoiled, corpus)
    changed = counted(before, after)
    assert [row.changed.value for row in rows[:3]] == [0, 0, 0]
    assert changed[4] > 0.5
    assert_counted(rows, changed, overlap(before, after))
    assert rows[-1].changed.value == pytest.approx(rows[3].changed.value / 4)


def test_two_experts_under_each_other_s_number_show_in_their_layer_alone(
    demo: Checkpoint, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    """The model computes the same, so that later layers see nothing of it, and the first model's choices tell all."""
    swapped = [1, 0, *range(2, 16)]  # of one group
    names = [demo.family.expert_names(2, expert) for expert in (0, 1)]
    renamed = dict(zip([*names[0], *names[1]], [*names[1], *names[0]], strict=True))
    rows_of = {name: lambda tensor: tensor[swapped] for name in router_disk_names(demo, 2)}
    other = Changed(base=demo, changes=rows_of, renamed=renamed)
    rows = routing([subject("before", demo), subject("after", other)], corpus, tmp_path)
    sets = chosen_sets(demo, corpus)[2]
    expected = sum(len(one & {0, 1}) == 1 for one in sets) / len(sets)
    assert expected > 0.02
    shares = {row.layer: row.changed.value for row in rows}
    assert shares[2] == pytest.approx(expected, abs=1e-12)
    assert shares[1] == 0
    assert max(shares[3] or 0, shares[4] or 0) <= 2.5 / rows[0].tokens


def test_of_a_pruned_model_only_choices_of_experts_that_stayed_are_asked_for(
    tiny_model: Callable[..., Path], corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_model("mixtral"))
    keep = keep_of(source, 5)
    windows = torch.randint(2, 256, (len(corpus.windows), 24), generator=torch.Generator().manual_seed(1))
    corpus = dataclasses.replace(corpus, windows=windows)
    pruned = subject("pruned", prune_source(source, keep), Kept(experts=keep, total=8))
    rows = routing([subject("before", source), pruned], corpus, tmp_path)
    before, after = chosen_sets(source, corpus), chosen_sets(source, corpus, keep)
    stayed = {layer: [one & set(keep[layer]) for one in sets] for layer, sets in before.items()}
    changed, common = {}, {}
    for layer, sets in stayed.items():
        pairs = list(zip(sets, after[layer], strict=True))
        changed[layer] = sum(not one <= other for one, other in pairs) / len(pairs)
        common[layer] = sum(len(one & other) for one, other in pairs) / sum(len(one) for one in sets)
    assert_counted(rows, changed, common)
    first = min(keep)
    assert changed[first] == 0, "without its rivals no expert is left out that was chosen with them"
    assert counted(before, after)[first] > 0.3, "though the sets differ"
    assert changed[max(keep)] > 0


def test_choices_in_a_file_are_compared_alike(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, quality: Quality, tmp_path: Path
) -> None:
    rows = routing((subjects[0], subjects[2]), corpus, tmp_path / "new", memory_bytes=1000, batch_windows=8)
    assert rows == [row for row in quality.routing if row.subject == "pruned"]
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_said_where_nothing_tells_which_experts_are_the_same(
    demo: Checkpoint, corpus: EvaluationCorpus, tmp_path: Path
) -> None:
    keep = keep_of(demo, 8)
    unknown = subject("pruned", prune_source(demo, keep))
    assert routing([subject("before", demo), unknown], corpus, tmp_path) == []


def test_experts_are_the_same_by_their_numbers_in_the_original(demo: Checkpoint) -> None:
    layers = demo.outline.moe_layers
    low, even = ({layer: list(kept) for layer in layers} for kept in (range(8), range(0, 16, 2)))
    whole = Routers(source=demo)
    one = Routers(source=prune_source(demo, low), kept=Kept(experts=low, total=16))
    other = Routers(source=prune_source(demo, even), kept=Kept(experts=even, total=16))
    again = Routers(source=one.source)  # as quantized from the folder of `one`: it has eight experts, of eight

    def numbers(first: Routers, second: Routers) -> list[int]:
        found = same_experts(first, second)
        assert found is not None
        assert sorted(found) == list(layers)
        return [int(number) for number in found[layers[0]]]

    assert numbers(whole, whole) == [*range(16)]
    assert numbers(whole, other) == even[layers[0]]
    assert numbers(other, whole) == [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1]
    assert numbers(one, other) == [0, 2, 4, 6, -1, -1, -1, -1]
    assert numbers(one, again) == numbers(again, one) == [*range(8)]
    assert same_experts(whole, again) is None


def test_choices_may_come_in_any_order_and_in_other_numbers_of_experts() -> None:
    before, after = torch.tensor([[0, 3], [1, 2], [4, 5]]), torch.tensor([[1, 0, 2], [1, 2, 0], [2, 1, 0]])
    there, again = chosen_again(before, after, torch.tensor([0, 3, 1]))
    assert there.tolist() == [[True, True], [True, False], [False, False]]
    assert again.tolist() == [[True, True], [True, False], [False, False]]


def test_a_pruned_folder_says_which_experts_it_has(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = tiny_model("mixtral"), tmp_path / "pruned"
    keep = keep_of(open_checkpoint(folder), 4)
    pruned_folder(folder, keep, out)
    assert subject_of("pruned", open_checkpoint(out)).kept == Kept(experts=keep, total=8)
    assert subject_of("whole", open_checkpoint(folder)).kept is None
    note = out / "moepress.json"
    said = json.loads(note.read_text())
    for change in ({"plan": None}, {"plan": {"keep": {"1": ["x"]}}}, {"experts_before": "8"}, {"experts_before": 1}):
        note.write_text(json.dumps(said | change))
        assert kept_in(out) is None
    note.write_text("{")
    assert kept_in(out) is None


def test_a_list_for_other_layers_is_not_taken(demo: Checkpoint) -> None:
    keep = keep_of(demo, 8)
    del keep[4]
    odd = dataclasses.replace(Routers(source=demo), kept=Kept(experts=keep, total=16))
    found = same_experts(Routers(source=demo), odd)
    assert found is not None
    assert [int(number) for number in found[4]] == [*range(16)]
