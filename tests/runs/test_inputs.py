"""A model that changes while something is made of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepress.errors import InvalidInputError
from moepress.runs.inputs import stamps
from moepress.runs.journal import open_run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def model_of(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def press(out: Path, model: Path, change: Callable[[], Any], **options: bool) -> None:
    watched = stamps(model.iterdir())
    with open_run(out, {"seed": 0}, inputs=watched, **options) as run:
        if run.done("a.txt") is None:
            run.write("a.txt", "a.txt", lambda file: file.write_text("new") and None)
        change()
        run.finish()


@pytest.mark.parametrize("what", ["size", "time", "gone", "replaced"])
def test_a_model_that_changes_during_the_run_is_refused(out: Path, tmp_path: Path, what: str) -> None:
    model = model_of(tmp_path / "model", {"model.safetensors": "weights", "config.json": "{}"})
    file = model / "model.safetensors"

    def change() -> None:
        if what == "size":
            file.write_text("other weights")
        elif what == "time":
            os.utime(file, ns=(1, 1))
        elif what == "gone":
            file.unlink()
        else:
            (tmp_path / "fresh").write_text("WEIGHTS")
            (tmp_path / "fresh").replace(file)

    with pytest.raises(InvalidInputError, match=r"model\.safetensors .* while the output was made") as caught:
        press(out, model, change)
    assert caught.value.exit_code == 4
    assert not out.exists()
    file.write_text("weights")
    press(out, model, lambda: None, resume=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a.txt": "new"}


def test_a_file_that_is_added_to_the_model_s_folder_changes_nothing(out: Path, tmp_path: Path) -> None:
    model_of(tmp_path / "model", {"config.json": "{}"})
    press(out, tmp_path / "model", lambda: (tmp_path / "model" / "notes.md").write_text("x"))
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a.txt": "new"}
