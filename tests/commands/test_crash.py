"""Bugs: one sentence, the traceback in a new file, and a run that can be gone on with."""

import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_runs import add_tokenizer, command, content

from moepress.commands import crash
from moepress.commands.attempt import Attempt
from moepress.commands.crash import LONGEST, describe, text_of
from moepress.runs import journal
from moepress.runs.journal import TRACEBACK, open_run
from moepress.runs.output import partial_folder
from moepress.runs.phases import in_layer, phase
from moepress.runs.text import printable
from moepress.stages import check as check_module
from moepress.stages import quantize as quantize_module


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: object, **_options: object) -> Any:
        raise error

    return fail


def tracebacks(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{TRACEBACK}*.txt"))


def test_a_bug_is_one_sentence_and_a_file(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "check_folder", raises(KeyError("x")))
    code, printed, errors = command("check", "demo")
    [file] = tracebacks(temporary)
    assert (code, printed) == (1, "")
    assert errors == (
        "Error: moepress check met a bug of its own while it checked: KeyError: 'x'; the traceback is in "
        f"{file}: report that file.\n"
    )
    text = file.read_text()
    assert "moepress check demo\n" in text
    assert "Traceback (most recent call last)" in text
    assert text.endswith("KeyError: 'x'\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_debug_prints_the_traceback_too(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "check_folder", raises(ValueError("a \x1b[31mred\x1b[0m word")))
    code, printed, errors = command("--debug", "check", "demo")
    assert (code, printed) == (1, "")
    assert errors.startswith("Traceback (most recent call last)")
    assert "check_stage" in errors
    assert "Error: moepress check met a bug" in errors.splitlines()[-1]
    assert "\x1b" not in errors
    assert "\x1b" not in tracebacks(temporary)[0].read_text()


def test_a_run_that_a_bug_ended_is_gone_on_with_and_its_traceback_is_no_part_of_the_output(
    tiny_copy: Callable[..., Path], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_copy("mixtral"), tmp_path / "text.txt"
    add_tokenizer(model)
    text.write_text("The cat sat on the mat, and the dog said no. " * 40)
    line = ["quantize", model, "--group-size", "32", "--domain", f"one={text}", "--tokens", "256", "--window", "16"]
    assert command(*line, "-o", tmp_path / "whole")[0] == 0
    plain, pieces = journal.Run.write, list[str]()

    def write(run: journal.Run, piece: str, *more: Any) -> Any:
        pieces.append(piece)
        return raises(KeyError("x"))() if len(pieces) == 3 else plain(run, piece, *more)

    out, work = tmp_path / "out", partial_folder(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(journal.Run, "write", write)
        code, _, errors = command(*line, "-o", out)
    assert code == 1
    [file] = tracebacks(work)
    assert tracebacks(temporary) == []
    sentence = (
        r"Error: moepress quantize met a bug of its own while it quantized, in layer \d+( \([\w ]+\))?: KeyError: 'x'; "
        rf"the traceback is in {re.escape(str(file))}: report that file, and repeat the command with --resume to go "
        r"on\.\n"
    )
    assert re.fullmatch(sentence, errors)
    code, _, errors = command(*line, "-o", out, "--resume")
    assert code == 0, errors
    assert content(out) == content(tmp_path / "whole")
    assert not work.exists()


def test_a_bug_before_the_first_piece_leaves_nothing_in_the_way_of_the_next_try(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "quantize", raises(KeyError("x")))
    code, _, errors = command("quantize", "demo", "-o", tmp_path / "out", "--tokens", "512", "--window", "32")
    assert code == 1
    assert "while it quantized" in errors
    assert "--resume" not in errors
    assert len(tracebacks(temporary)) == 1
    assert not partial_folder(tmp_path / "out").exists()


def test_a_run_names_the_stage_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress.stages import profile

    monkeypatch.setattr(profile, "collect", raises(IndexError("7")))
    code, _, errors = command("run", "demo", "-o", tmp_path / "out", "--tokens", "512", "--window", "32")
    assert code == 1
    assert "moepress run met a bug of its own while it profiled: IndexError: 7;" in errors
    assert errors.endswith("repeat the command with --resume to go on.\n")


def test_a_full_disk_loses_the_file_and_not_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", raises(OSError(28, "No space left on device")))
    monkeypatch.setattr(check_module, "check_folder", raises(KeyError("x")))
    code, _, errors = command("check", "demo")
    assert code == 1
    assert errors.endswith("KeyError: 'x'; no traceback could be written: add --debug.\n")


def test_a_work_folder_of_nobody_takes_no_file(tmp_path: Path, temporary: Path) -> None:
    partial_folder(tmp_path / "out").mkdir()
    describe(KeyError("x"), Attempt(command="prune", output=tmp_path / "out"))
    assert len(tracebacks(temporary)) == 1
    assert list(partial_folder(tmp_path / "out").iterdir()) == []


def test_what_an_error_says_is_short_and_safe_in_a_terminal() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert text_of(ValueError("one\n  two\x1b]0;title\x07 \u202e\udc80.")) == (
        r"ValueError: one two\x1b]0;title\x07 \u202e\udc80"
    )
    assert len(text_of(ValueError("x" * 10_000))) == LONGEST
    assert text_of(MuteError()) == "MuteError"
    assert text_of(AssertionError()) == "AssertionError"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"


def test_errors_know_the_innermost_layer_and_phase() -> None:
    def told(error: Exception) -> str:
        with pytest.raises(type(error)), phase("outer"), in_layer(3), phase("solve"):
            raise error
        return crash.place_of(error)

    assert told(KeyError("x")) == "layer 3 (solve)"
    with pytest.raises(KeyError) as caught, phase("start"):
        raise KeyError("x")
    assert crash.place_of(caught.value) == "the phase `start`"
    assert crash.place_of(KeyError("x")) == ""


def test_full_memory_is_no_bug(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "check_folder", raises(MemoryError()))
    code, _, errors = command("check", "demo")
    assert code == 1
    assert errors.startswith("Error: The machine ran out of memory; ")
    assert tracebacks(temporary) == []


def test_a_finished_output_holds_no_traceback(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", {}) as run:
        run.write("one", "one.txt", lambda path: path.write_text("1") and None)
        (run.folder / f"{TRACEBACK}abc.txt").write_text("of a try before")
        run.finish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["one.txt"]
