"""An output of one file: it appears whole, replaces nothing but ours, and its folder goes."""

import errno
import os
from pathlib import Path

import pytest

from moepress.errors import UsageError
from moepress.runs.single import check_single, making, put_single


def ours(file: Path) -> bool:
    return file.read_text().startswith("ours")


def made(file: Path, text: str = "ours, new") -> Path:
    """The folder of a run that is finished."""
    folder = making(file)
    (folder / "deeper").mkdir(parents=True)
    (folder / file.name).write_text(text)
    (folder / "deeper" / "notes.txt").write_text("x")
    return folder


def test_a_file_appears_and_its_folder_goes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    made(file)
    check_single(file, ours, force=False)
    put_single(file.name, file, ours, force=False)
    assert file.read_text() == "ours, new"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("text", ["ours, old", "theirs"])
def test_only_ours_is_replaced_and_only_when_asked(tmp_path: Path, text: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_text(text)
    with pytest.raises(UsageError, match="--force to replace"):
        check_single(file, ours, force=False)
    folder = made(file)
    if ours(file):
        put_single(file.name, file, ours, force=True)
        assert file.read_text() == "ours, new"
        assert not folder.exists()
        return
    with pytest.raises(UsageError, match="not made by moepress"):
        check_single(file, ours, force=True)
    with pytest.raises(UsageError, match="has appeared meanwhile"):
        put_single(file.name, file, ours, force=True)
    assert file.read_text() == text
    assert (folder / file.name).is_file()


def test_what_appears_on_the_way_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    folder = made(file)
    file.write_text("ours, of another run")
    with pytest.raises(UsageError, match="what was made is"):
        put_single(file.name, file, ours, force=False)
    assert file.read_text() == "ours, of another run"
    assert (folder / file.name).read_text() == "ours, new"


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    file, target = tmp_path / "model.gguf", tmp_path / "target"
    target.write_text("ours")
    file.symlink_to(target)
    with pytest.raises(UsageError, match="not made by moepress"):
        check_single(file, ours, force=True)


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "model.gguf"
    made(file)
    put_single(file.name, file, ours, force=False)
    assert file.read_text() == "ours, new"
    assert not making(file).exists()


def test_what_another_has_put_into_the_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    folder = made(file)
    link = os.link

    def and_more(source: Path, target: Path) -> None:
        link(source, target)
        (folder / "mine.txt").write_text("of the user")

    monkeypatch.setattr(os, "link", and_more)
    put_single(file.name, file, ours, force=False)
    (kept,) = tmp_path.glob("*.done-*")
    assert [p.name for p in kept.iterdir()] == ["mine.txt"]
    assert not folder.exists()
