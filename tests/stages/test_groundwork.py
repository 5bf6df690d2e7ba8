"""What is refused before any work: windows and tokens that no text or model has; and templates that never end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_runs import add_tokenizer, command
from texts import DEMO

from moepress.calibration import templates
from moepress.calibration.templates import RenderLimits
from moepress.errors import UsageError
from moepress.stages import groundwork
from moepress.stages.evaluation import Evaluation, evaluation_corpus
from moepress.stages.groundwork import load_corpus
from moepress.stages.places import Calibration, context_notes

TinyFactory = Callable[..., Path]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "1024"], "--window 1024 exceeds the model's context of 512 tokens"),
        (["--tokens", str(10**12)], "--tokens 1000000000000 are more than"),
        (["--tokens", str(10**30)], "are more than"),
    ],
)
@pytest.mark.parametrize("stage", ["profile", "quantize"])
def test_windows_and_tokens_that_can_not_be_are_refused_before_any_text_is_read(
    stage: str, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(groundwork, "load_tokenizer", never)
    code, _, err = command(stage, "demo", "-o", tmp_path / "out", *options)
    assert (code, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_window_of_evaluation_beyond_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="--window 1024 exceeds the model's context of 512 tokens"):
        evaluation_corpus(DEMO, Evaluation(window=1024), context=512, vocabulary=2048)


def test_a_cache_beyond_the_context_is_noted() -> None:
    assert context_notes(None, 512) == context_notes(512, 512) == []
    (note,) = context_notes(1024, 512)
    assert "1,024 tokens exceeds the model's own of 512" in note
    code, out, _ = command("inspect", "demo", "--context", 1024)
    assert code == 0
    assert " ".join(note.split()[:6]) in " ".join(out.split())


def test_files_of_one_stem_are_domains_of_a_profile_and_what_was_not_read_is_noted(tmp_path: Path) -> None:
    for name in ("wiki", "german"):
        (tmp_path / name).mkdir()
        text = (DEMO / "text" / name / "calibration.txt").read_text(encoding="utf-8")
        (tmp_path / name / "train.txt").write_text(text * 20, encoding="utf-8")
    files = tuple(str(tmp_path / name / "train.txt") for name in ("wiki", "german"))
    corpus = load_corpus(DEMO, Calibration(sources=files, tokens=2048, window=64), context=512, vocabulary=2048)
    assert corpus.domains == ("wiki", "german")
    assert corpus.tokens_per_domain == (1024, 1024)
    assert [note.partition(":")[0] for note in corpus.notes] == ["domain wiki", "domain german"]


def test_a_chat_template_that_never_ends_is_a_sentence(
    tiny_copy: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "DEFAULT_LIMITS", RenderLimits(seconds=1))
    model = tiny_copy("qwen3_moe")
    add_tokenizer(model)
    (model / "chat_template.jinja").write_text(LOOP)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    said = []
    profile = ["profile", model, "-o", tmp_path / "out", "--calibration", chats]
    for arguments in (profile, ["generate", model, "hi", "--chat"]):
        code, _, err = command(*arguments)
        said.append(" ".join(err.split()))
        assert (code, "it takes longer than 1 seconds" in said[-1]) == (4, True), err
    assert "chats.jsonl, line 1: the tokenizer's chat template refuses this conversation" in said[0]
    assert "The tokenizer's chat template can not be used" in said[1]


def test_what_was_not_read_is_said_by_quantize_and_in_the_report(tmp_path: Path) -> None:
    text = (DEMO / "text" / "wiki" / "calibration.txt").read_text(encoding="utf-8")
    for name in ("long", "other"):
        (tmp_path / f"{name}.txt").write_text(text * 10, encoding="utf-8")
    one, two = tmp_path / "long.txt", tmp_path / "other.txt"
    words = "Calibration: domain x: windows are drawn from the first"
    options = ["--domain", f"x={one}", "--domain", f"x={two}", "--tokens", 256, "--window", 64, "--group-size", 32]
    code, _, err = command("quantize", "demo", "-o", tmp_path / "out", *options)
    assert (code, words in err) == (0, True), err
    data = ["--data-domain", f"y={one}", "--data-domain", f"y={two}", "--max-windows", 2, "--no-throughput"]
    code, _, err = command("run", "demo", "-o", tmp_path / "run", *options, *data)
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert any(note.startswith(words) and "2 of its 2 files" in note for note in report["notes"])
    measured = "domain y: 2 windows were measured, the beginning of each of its 2 files; the rest was not read"
    assert measured in report["quality"]["notes"]
