"""`run --grid`: blocks of GGUF from the plan to the report, and what does not go with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from stage_runs import command

from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.errors import UsageError
from moepress.stages.run.dry_run import estimate_recipe
from moepress.stages.run.recipe import check_recipe, make_recipe
from moepress.stages.run.run import run_recipe
from moepress.validation.report.model_card import plain_card

SMALL: dict[str, Any] = {
    "model": "demo",
    "tokens": 2048,
    "window": 64,
    "keep": 0.75,
    "max_windows": 2,
    "throughput": False,
    "grid": "q4_0",
    "to": ["gguf"],
    "max_memory": 1 << 30,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_recipe(make_recipe(SMALL), out)
    return out


def test_the_file_holds_the_blocks_and_is_measured(finished: Path) -> None:
    file = gguf_file(finished / "exports" / "gguf")
    assert file is not None
    kinds = {t.type for name, t in open_gguf(file).tensors.items() if "_exps" in name}
    assert kinds == {"Q4_0"}
    report = json.loads((finished / "report.json").read_text())
    assert [subject["label"] for subject in report["subjects"]][-2:] == ["pruned + q4_0", "q4_0, GGUF"]
    assert report["quantization"]["scheme"] == "GGUF's q4_0, attention, dense and shared in Q8_0"
    before, after = (report["quality"]["rows"][n] for n in (0, -1))
    assert before["perplexity"]["value"] > 0
    assert after["perplexity"]["value"] > 0


def test_cards_say_what_reads_each_folder(finished: Path) -> None:
    blocks, file = ((finished / name / "README.md").read_text() for name in ("model", "exports/gguf"))
    assert "from_pretrained" not in blocks
    assert "moepress export" in blocks
    made = gguf_file(finished / "exports" / "gguf")
    assert made is not None
    assert f"llama-server -m path/to/this/folder/{made.name}\n" in file
    assert made.name in plain_card(made.parent, finished / "model")
    code, shown, said = command("check", finished / "model")
    assert code == 0, said
    assert "No runtime reads such a folder" in " ".join(shown.split())
    assert "from_pretrained" not in plain_card(finished / "model", finished / "model")


def test_a_finished_run_is_left_as_it_is(finished: Path) -> None:
    made = (finished / "report.json").read_bytes()
    run_recipe(make_recipe(SMALL), finished, resume=True)
    assert (finished / "report.json").read_bytes() == made


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"bits": 4}, "--bits"),
        ({"group_size": 32}, "--group-size"),
        ({"to": ["gguf", "onnx"]}, "--to gguf"),
        ({"budget": 1 << 30, "keep": None}, "--budget"),
        ({"grid": "q4_x"}, "q4_x is not there"),
    ],
)
def test_what_does_not_go_with_a_grid_is_refused(more: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check_recipe(make_recipe(SMALL | more))


def test_a_mix_takes_in_the_whole_model(tmp_path: Path) -> None:
    known = estimate_recipe(make_recipe(SMALL | {"grid": "Q4_K_M"}), tmp_path / "out").plain()
    one = estimate_recipe(make_recipe(SMALL | {"grid": "q4_k"}), tmp_path / "out").plain()
    assert known["grid"] == "Q4_K_M"
    assert known["sizes"]["after_bytes"] < one["sizes"]["after_bytes"]


def test_the_command_knows_it(tmp_path: Path) -> None:
    code, _out, err = command("run", "demo", "-o", tmp_path / "out", "--grid", "q4_k", "--to", "gptq")
    assert code == 2
    assert "--to gguf" in err
