"""Options to domains and their files."""

from pathlib import Path
from typing import Any

import pytest
from texts import Write, texts

from moepress.calibration import sources as sources_module
from moepress.calibration.sources import Source, embedded_sources, parse_sources, source_files
from moepress.errors import InvalidInputError, UsageError


def test_a_file_is_a_domain_of_its_stem(write: Write) -> None:
    paths = [write("news.jsonl", ""), write("law.txt.gz", b"")]
    assert [(s.domain, s.location, s.embedded) for s in parse_sources(paths, ())] == [
        ("news", paths[0], False),
        ("law", paths[1], False),
    ]


def test_sub_folders_with_text_are_domains(write: Write, tmp_path: Path) -> None:
    for name in ["math/b.txt", "math/deep/a.jsonl", "code/x.py", "math/.hidden.txt", "pictures/x.png"]:
        write(name, "text")
    found = [(s.domain, Path(s.location).name) for s in parse_sources([str(tmp_path)], ())]
    assert found == [("code", "x.py"), ("math", "b.txt"), ("math", "a.jsonl")]


def test_files_of_a_flat_folder_are_domains(write: Write, tmp_path: Path) -> None:
    for name in ["b.txt", "a.jsonl", "weights.bin"]:
        write(name, "text")
    assert [s.domain for s in parse_sources([str(tmp_path)], ())] == ["a", "b"]


def test_a_domain_may_be_given_several_times(write: Write, tmp_path: Path) -> None:
    one, two = write("one.txt", "1"), write("two/in.txt", "2")
    found = parse_sources((), [f"law={one}", f"law={tmp_path / 'two'}", "law=some/dataset"])
    assert [(s.domain, s.location) for s in found] == [("law", one), ("law", two), ("law", "some/dataset")]


def test_a_dataset_is_a_domain_of_its_name() -> None:
    (source,) = parse_sources(["Salesforce/wikitext:wikitext-2-raw-v1/test*"], ())
    assert (source.domain, source.location) == ("wikitext", "Salesforce/wikitext:wikitext-2-raw-v1/test*")


@pytest.mark.parametrize("location", ["nowhere", "data/nowhere.txt", "a/b/c", "/no/such/file.jsonl"])
def test_a_location_that_is_nothing_is_refused(location: str) -> None:
    with pytest.raises(InvalidInputError, match="no such file or folder"):
        parse_sources([location], ())
    with pytest.raises(InvalidInputError, match="no such file or folder"):
        parse_sources((), [f"x={location}"])


def test_folders_without_text_or_with_unclear_domains_are_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="no text file"):
        parse_sources([str(tmp_path / "empty")], ())
    with pytest.raises(InvalidInputError, match="no text file"):
        parse_sources((), [f"x={tmp_path / 'empty'}"])
    write("mixed/a.txt", "a")
    write("mixed/sub/b.txt", "b")
    with pytest.raises(InvalidInputError, match="beside and in sub-folders"):
        parse_sources([str(tmp_path / "mixed")], ())


@pytest.mark.parametrize("option", ["law", "=x.txt", "law="])
def test_a_domain_option_needs_a_name_and_a_file(option: str) -> None:
    with pytest.raises(UsageError, match="NAME=FILE"):
        parse_sources((), [option])


def test_a_dataset_comes_from_the_cache_before_the_network(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["data/train-0.parquet", "data/test-0.parquet", "evil.pkl", "train.md"]:
        write(name, b"")
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = source_files(Source(domain="x", location="owner/name:data/train", embedded=False))
    assert found == (tmp_path / "data/train-0.parquet",)
    assert len(calls) == 1
    assert calls[0]["repo"] == "owner/name"
    assert calls[0]["repo_type"] == "dataset"
    assert calls[0]["local_files_only"] is True
    assert all(pattern.endswith((".parquet", ".jsonl", ".txt")) for pattern in calls[0]["allow_patterns"])
    assert len(source_files(Source(domain="x", location="owner/name", embedded=False))) == 2
    with pytest.raises(InvalidInputError, match="no file that matches"):
        source_files(Source(domain="x", location="owner/name:validation*", embedded=False))
    assert [call["local_files_only"] for call in calls[2:]] == [True, False]


def test_a_dataset_that_can_not_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise FileNotFoundError("offline\nlong advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InvalidInputError, match=r"owner/name: no such file here.*\(offline\).*give the path"):
        source_files(Source(domain="x", location="owner/name", embedded=False))


def test_the_embedded_python_splits_are_disjoint_and_bounded() -> None:
    splits = {}
    for split in ("calibration", "evaluation"):
        found = embedded_sources(split)
        assert all(source.embedded for source in found)
        assert [s.domain for s in found if s.domain != "python"] == ["german", "math", "wiki"]
        splits[split] = [Path(s.location) for s in found if s.domain == "python"]
        assert 200_000 <= sum(path.stat().st_size for path in splits[split]) <= 400_000
    assert not set(splits["calibration"]) & set(splits["evaluation"])


def test_embedded_modules_carry_their_path(tokenizer: Any) -> None:
    source = next(s for s in embedded_sources("calibration") if s.location.endswith("decoder.py"))
    (text,) = texts(source.location, tokenizer, embedded=True)
    assert text.startswith("# ==== json/decoder.py ====\n")


def test_a_missing_embedded_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources_module, "files", lambda package: tmp_path)
    with pytest.raises(InvalidInputError, match="install moepress again"):
        embedded_sources("calibration")


def domains_of(found: tuple[Source, ...]) -> list[str]:
    return [source.domain for source in found]


def test_files_of_one_stem_are_domains_of_their_folders(write: Write, tmp_path: Path) -> None:
    paths = [write(name, "text") for name in ("wiki/train.txt", "german/train.txt", "law.txt")]
    assert domains_of(parse_sources(paths, ())) == ["wiki", "german", "law"]
    deep = [write(name, "text") for name in ("x/en/data/train.jsonl", "x/de/data/train.jsonl")]
    assert domains_of(parse_sources(deep, ())) == ["en", "de"]
    crossed = [write(name, "text") for name in ("a/x/t.txt", "a/y/t.txt", "b/x/t.txt")]
    assert domains_of(parse_sources(crossed, ())) == ["a-x", "a-y", "b-x"]
    assert domains_of(parse_sources([str(tmp_path / "wiki"), str(tmp_path / "german")], ())) == ["wiki", "german"]
    assert domains_of(parse_sources((), [f"all={path}" for path in paths])) == ["all"] * 3


def test_files_of_one_stem_and_folder_share_a_domain(write: Write) -> None:
    paths = [write(name, "text") for name in ("train.txt", "train.jsonl")]
    assert domains_of(parse_sources(paths, ())) == ["train", "train"]


def test_a_file_that_is_named_twice_is_read_once(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write("a.txt", "text")
    monkeypatch.chdir(tmp_path)
    assert len(parse_sources([path, "a.txt", "./a.txt"], ["a=a.txt", "b=a.txt"])) == 2


def test_json_and_csv_of_a_folder_are_read_where_it_has_no_other_text(write: Write, tmp_path: Path) -> None:
    write("one/data.json", "[]")
    write("one/data.csv", "text")
    assert domains_of(parse_sources([str(tmp_path / "one")], ())) == ["data", "data"]
    write("one/a.txt", "text")
    assert domains_of(parse_sources([str(tmp_path / "one")], ())) == ["a"]


@pytest.mark.parametrize("location", ["a" * 5000, "a\0b", "~nobody-of-that-name/x.txt"])
def test_a_name_that_no_file_can_have_is_a_sentence(location: str) -> None:
    for calibration, domains in (([location], []), ([], [f"x={location}"])):
        with pytest.raises(InvalidInputError, match=r"can not be looked at|no such file"):
            parse_sources(calibration, domains)


def test_an_empty_name_is_not_the_folder_one_is_in() -> None:
    with pytest.raises(UsageError, match="a name of text is empty"):
        parse_sources([""], ())
