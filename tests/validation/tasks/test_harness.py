"""The real lm-evaluation-harness on tasks in files: what it counts is what is counted by hand."""

import re
import socket
from pathlib import Path

import pytest
import yaml
from tasks_asked import CHOICES, SUMS, ask_text_model, write_choices, write_sums

from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import prune_source
from moepress.validation.tasks.harness import ask, load_tasks, open_catalogue
from moepress.validation.tasks.language_model import language_model
from moepress.validation.tasks.own import own_scores
from moepress.validation.tasks.paired import compare
from moepress.validation.tasks.text_model import TextModel, Writing

pytest.importorskip("lm_eval")

KEPT = [group * 4 + expert for group in range(4) for expert in (0, 2)]


@pytest.fixture(scope="module")
def pruned(demo: Checkpoint) -> TextModel:
    return ask_text_model(demo, prune_source(demo, dict.fromkeys(range(1, 5), KEPT)), label="pruned")


def right(model: TextModel) -> list[float]:
    """Each choice item, by scores of single continuations."""
    found = []
    for question, choices, answer in CHOICES:
        likely = [model.loglikelihoods([(question, f" {choice}")])[0][0] for choice in choices]
        found.append(float(likely.index(max(likely)) == answer))
    return found


def written(model: TextModel) -> list[float]:
    texts = [model.write([(question, Writing(until=("\n",), room=8))])[0] for question, _ in SUMS]
    numbers = [re.findall("([0-9]+)", text) for text in texts]
    return [float(bool(n) and n[0] == answer) for n, (_, answer) in zip(numbers, SUMS, strict=True)]


def test_both_models_item_by_item(demo_text: TextModel, pruned: TextModel, tmp_path: Path) -> None:
    files = [str(write_choices(tmp_path)), str(write_sums(tmp_path))]
    catalogue = open_catalogue(files)
    (before, asked), (after, _) = (ask(catalogue, language_model(m), limit=None) for m in (demo_text, pruned))
    assert [one.name for one in asked] == ["choice", "sums"]
    rows = {row.task: row for row in compare("pruned", before, after, asked)}
    for task, hand in (("choice", right), ("sums", written)):
        one, other, row = hand(demo_text), hand(pruned), rows[task]
        assert (row.before, row.after) == pytest.approx((sum(one) / len(one), sum(other) / len(other)))
        assert row.flips is not None
        assert row.flips.lost == sum(x > y for x, y in zip(one, other, strict=True))
        assert row.flips.won == sum(y > x for x, y in zip(one, other, strict=True))
        assert (row.items, row.num_fewshot) == (len(one), 0)
    assert (rows["choice"].filter, rows["sums"].filter) == ("none", "number")
    assert (rows["choice"].max_gen_toks, rows["sums"].max_gen_toks) == (None, 8)
    assert rows["choice"].before > 0.5


def test_a_limit_takes_the_first_items(demo_text: TextModel, tmp_path: Path) -> None:
    catalogue = open_catalogue([str(write_choices(tmp_path))])
    (scores, _), (all_of_them, _) = (ask(catalogue, language_model(demo_text), limit=n) for n in (2, None))
    assert scores["choice"].items == all_of_them["choice"].items[:2]


def test_own_tasks_give_the_same_with_and_without_the_harness(demo_text: TextModel) -> None:
    names = ("moepress_continuation", "moepress_sums")
    found, asked = ask(open_catalogue(names), language_model(demo_text), limit=12)
    assert [one.name for one in asked] == list(names)
    for name in names:
        assert found[name] == own_scores(name, demo_text, 12)


def test_a_group_has_a_row_of_its_own_and_its_tasks(demo_text: TextModel, tmp_path: Path) -> None:
    first, second = write_choices(tmp_path / "own", "one"), write_sums(tmp_path / "own", "two")
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    group = first.parent / "both.yaml"
    group.write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}))
    _, (asked,) = ask(open_catalogue([str(group)]), language_model(demo_text), limit=2)
    assert (asked.name, asked.tasks, asked.by_size) == ("both", ("one", "two"), False)
    group.write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    _, alone = ask(open_catalogue([str(group)]), language_model(demo_text), limit=2)
    assert [one.name for one in alone] == ["one", "two"]
    group.unlink()
    _, of_folder = ask(open_catalogue([str(second.parent)]), language_model(demo_text), limit=1)
    assert [one.name for one in of_folder] == ["one", "two"]


def test_what_can_not_be_compared_or_run_is_refused(demo_text: TextModel, tmp_path: Path) -> None:
    drawn = write_sums(tmp_path, "drawn", generation_kwargs={"until": ["\n"], "do_sample": True, "temperature": 0.7})
    with pytest.raises(UsageError, match="answers that are drawn"):
        ask(open_catalogue([str(drawn)]), language_model(demo_text), limit=1)
    with pytest.raises(UsageError, match="runs code that the model writes"):
        load_tasks(open_catalogue([str(write_sums(tmp_path, "unsafe", unsafe_code=True))]))
    missing = write_choices(tmp_path, "lost")
    missing.with_suffix(".jsonl").unlink()
    with pytest.raises(MoepressError, match="can not load the tasks"):
        load_tasks(open_catalogue([str(missing)]))


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    for text, said in (("a: [", "not a readable task"), ("- 1", "not a readable task"), ("a: 1", "names no `task`")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InvalidInputError, match=said):
            open_catalogue([str(tmp_path / "x.yaml")])
    with pytest.raises(UsageError, match="holds no task"):
        open_catalogue([str(tmp_path)])


def test_tasks_in_files_ask_nobody_on_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*where: object, **_: object) -> None:
        raise AssertionError(f"asked {where}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    load_tasks(open_catalogue([str(write_choices(tmp_path)), "moepress_sums"]))


def test_prompts_have_the_chat_template_where_it_is_asked_for(demo: Checkpoint, tmp_path: Path) -> None:
    model, catalogue = ask_text_model(demo), open_catalogue([str(write_sums(tmp_path))])
    with pytest.raises(UsageError, match="no chat template; leave --chat out"):
        ask(catalogue, language_model(model), limit=1, chat=True)
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked: list[str] = []
    plain = model.write
    model.write = lambda requests: asked.extend(text for text, _ in requests) or plain(requests)  # type: ignore[method-assign,func-returns-value]
    try:
        ask(catalogue, language_model(model), limit=1, chat=True)
    finally:
        model.close()
    assert asked == [f"<user>{SUMS[0][0]}<assistant>"]


def test_a_functions_tag_of_the_user_s_own_file_is_run(tmp_path: Path) -> None:
    file = write_choices(tmp_path, "shout")
    (file.parent / "own.py").write_text("def text(doc):\n    return doc['q'].upper()\n")
    file.write_text(file.read_text().replace("doc_to_text: '{{q}}'", "doc_to_text: !function own.text"))
    task = load_tasks(open_catalogue([str(file)]))["tasks"]["shout"]
    assert task.doc_to_text({"q": "abc"}) == "ABC"
