"""`quantize --end-weight` from the command line: conversations with ends, text without, and a resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import command, content

from moepress.calibration.hessian import MOST_END_WEIGHT
from moepress.stages.places import model_folder

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
EOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template that ends answers."""
    folder = tmp_path_factory.mktemp("chatting") / "model"
    shutil.copytree(model_folder("demo"), folder, ignore=shutil.ignore_patterns("text", "*.py", "__pycache__"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "chats.jsonl"
    words = re.findall(r"\w+", "the river runs under a bridge of stone and the miller counts his sacks of flour")
    rows = []
    for number in range(300):
        said = [" ".join(words[(number * step + place) % len(words)] for place in range(20)) for step in (3, 7)]
        rows.append({"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


GIVEN = ("--group-size", "64", "--tokens", "1024", "--window", "128", "--effort", "fast")


def quantized(model: Path, out: Path, *more: object) -> str:
    code, _, said = command("quantize", model, "-o", out, *GIVEN, *more)
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def four(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Quantized on conversations with a weight of 4, and what was said; not to be changed."""
    out = tmp_path_factory.mktemp("four") / "out"
    return out, quantized(model, out, "--domain", f"own={chats}", "--end-weight", "4")


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


def test_ends_of_answers_in_conversations_change_the_codes_and_the_folder_says_so(
    model: Path, chats: Path, four: tuple[Path, str], tmp_path: Path
) -> None:
    text = "--domain", f"own={chats}"
    assert "Hessians" not in quantized(model, tmp_path / "default", *text)
    quantized(model, tmp_path / "one", *text, "--end-weight", "1")
    assert content(tmp_path / "one") == content(tmp_path / "default")
    folder, said = four
    before, after = (tiny_models.load_tensors(place) for place in (tmp_path / "default", folder))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".experts." in name for name in changed)
    assert any(".self_attn." in name for name in changed)
    assert all("packed" in name or "scale" in name for name in changed)
    told = json.loads((folder / "moepress.json").read_text())
    (note,) = [note for note in told["calibration"]["notes"] if "Hessians" in note]
    assert f"Note: Calibration: {note}." in said
    assert "ends of answers or reasoning, count 4 times in the Hessians" in note
    assert (told["hessian"]["end_weight"], told["hessian"]["end_marks"]) == (4.0, [EOS])
    assert json.loads((tmp_path / "one" / "moepress.json").read_text())["hessian"]["end_marks"] == []


def test_text_without_ends_gives_the_bytes_that_it_gives_without_the_option(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("The river runs under a bridge of stone. " * 600)
    quantized(model, tmp_path / "default", "--domain", f"own={text}")
    said = quantized(model, tmp_path / "four", "--domain", f"own={text}", "--end-weight", "4")
    assert "no token that ends an answer or reasoning, so --end-weight changed nothing" in said
    assert shards(tmp_path / "four") == shards(tmp_path / "default")


def test_a_resume_with_another_weight_is_refused_and_one_with_the_same_ends_with_the_same_bytes(
    model: Path, chats: Path, four: tuple[Path, str], tmp_path: Path
) -> None:
    text = "--domain", f"own={chats}"
    quantized(model, tmp_path / "out", *text, "--end-weight", "4", "--max-pieces", "2")
    given = "quantize", model, "-o", tmp_path / "out", *GIVEN, *text
    code, _, said = command(*given, "--end-weight", "5", "--resume")
    assert code == 2
    assert "--end-weight was 4.0, now 5.0" in said
    quantized(model, tmp_path / "out", *text, "--end-weight", "4", "--resume")
    assert content(tmp_path / "out") == content(four[0])


@pytest.mark.parametrize("weight", ["0.5", "nan", "1001"])
def test_weights_that_are_none_are_refused_before_any_work(model: Path, tmp_path: Path, weight: str) -> None:
    for given in (["quantize", model], ["run", model]):
        code, _, said = command(*given, "-o", tmp_path / "out", "--end-weight", weight)
        assert code == 2
        assert "--end-weight" in said
        assert f"give a number from 1 (off) to {MOST_END_WEIGHT}" in said
        assert not list(tmp_path.iterdir())


def test_a_run_says_it_in_its_report(model: Path, chats: Path, tmp_path: Path) -> None:
    given = ["run", model, "-o", tmp_path / "out", *GIVEN, "--domain", f"own={chats}", "--end-weight", "4"]
    code, _, said = command(*given, "--bits", "4", "--no-throughput", "--max-windows", "1", "--tokens", "512")
    assert code == 0, said
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert any("count 4 times in the Hessians" in note for note in notes)
    assert "end_weight: 4.0" in (tmp_path / "out" / "recipe.yaml").read_text()
