"""A .gguf file alone, without the folder that it was written with: its tokenizer, and heads that lead astray."""

import json
import os
import struct
from pathlib import Path

import pytest
from stage_runs import command

from moepress.calibration.sources import embedded_sources, source_files
from moepress.converters.gguf.export import GgufRequest
from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.converters.gguf.vocabulary import tokenizer_of
from moepress.errors import InvalidInputError
from moepress.models import demo
from moepress.stages.export import gguf_stage
from moepress.stages.places import Output
from moepress.stages.tokenizer import read_tokenizer
from moepress.validation.report.provenance import model_files


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as one file."""
    file = tmp_path_factory.mktemp("lone") / "demo.gguf"
    gguf_stage("demo", Output(folder=file), GgufRequest())
    return file


def test_the_file_s_own_tokenizer_gives_the_ids_of_the_folder_s(lone: Path) -> None:
    found, wanted = tokenizer_of(open_gguf(lone)), read_tokenizer(Path(demo.__file__).parent).tokenizer
    texts = [file.read_text()[:2000] for source in embedded_sources("evaluation") for file in source_files(source)]
    assert texts
    for text in texts:
        ids = found(text)["input_ids"]
        assert ids == wanted(text)["input_ids"]
        assert found.decode(ids, skip_special_tokens=True) == wanted.decode(ids, skip_special_tokens=True)
    assert found.eos_token_id == wanted.eos_token_id


def test_a_name_in_capitals_is_a_file_too(lone: Path, tmp_path: Path) -> None:
    code, _, said = command("export", "demo", "--to", "gguf", "-o", tmp_path / "DEMO.GGUF")
    assert code == 0, said
    assert (tmp_path / "DEMO.GGUF").read_bytes()[:4] == b"GGUF"
    assert gguf_file(tmp_path / "DEMO.GGUF") == tmp_path / "DEMO.GGUF"


def test_a_report_on_a_file_says_which_file_it_was(lone: Path, tmp_path: Path) -> None:
    code, _, said = command("validate", "demo", lone, "-o", tmp_path / "v", "--max-windows", "1", "--no-throughput")
    assert code == 0, said
    (lone.parent / "other.gguf").write_bytes(b"GGUF")  # one more model in the folder
    try:
        code, _, said = command("validate", "demo", lone, "-o", tmp_path / "w", "--max-windows", "1", "--no-throughput")
    finally:
        (lone.parent / "other.gguf").unlink()
    assert code == 0, said
    checks = json.loads((tmp_path / "w" / "report.json").read_text())["checks"]
    assert [row["runtime"] for row in checks] == ["llama.cpp"]
    inputs = json.loads((tmp_path / "v" / "provenance.json").read_text())["inputs"]
    assert [file["path"] for file in inputs[1]["files"]] == ["demo.gguf"]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.gguf").write_bytes(lone.read_bytes())
    assert [file.name for file in model_files(tmp_path / "f")] == ["x.gguf"]


def test_a_folder_of_several_is_asked_which(lone: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(lone.read_bytes())
    for words in (("check", tmp_path), ("validate", "demo", tmp_path), ("generate", tmp_path, "x")):
        code, _, said = command(*words)
        assert code == 4, said
        assert "holds 2 GGUF models (a.gguf, b.gguf); give the path of one of them" in said


def test_generate_and_validate_take_it(lone: Path) -> None:
    code, out, err = command("generate", lone, "def main():", "--max-new-tokens", 2)
    assert code == 0, err
    assert out.strip() or out
    for pair in (("demo", lone), (lone, lone)):
        code, out, err = command("validate", *pair, "--no-throughput", "--max-windows", 1, "--json")
        assert code == 0, err


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for arguments in (("generate", tmp_path / "no.gguf", "x"), ("validate", "demo", tmp_path / "no.gguf")):
        code, _out, err = command(*arguments)
        assert code == 4
        assert "There is no file" in err


def _key(kind: int, value: bytes) -> bytes:
    return struct.pack("<IIQQ", 0x46554747, 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "head",
    [
        _key(9, struct.pack("<IQ", 4, 1 << 40)),  # an array that reaches past the end
        _key(9, struct.pack("<IQ", 8, 1 << 40)),
        _key(9, struct.pack("<IQ", 9, 1 << 62)),
        _key(8, struct.pack("<Q", 1 << 63)),
        _key(77, b""),
        struct.pack("<IIQQ", 0x46554747, 3, 0, 1 << 60),
        struct.pack("<IIQQ", 0x46554747, 9, 0, 0),
        b"GGUF",
        b"",
        b"PK",
    ],
)
def test_heads_that_reach_past_the_end_are_refused_at_once(tmp_path: Path, head: bytes) -> None:
    file = tmp_path / "h.gguf"
    file.write_bytes(head)
    with pytest.raises(InvalidInputError, match=r"no GGUF file that can be read"):
        open_gguf(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    found = gguf_file(tmp_path)
    assert found is not None
    with pytest.raises(InvalidInputError, match="named pipe"):
        open_gguf(found)


@pytest.mark.parametrize(("key", "value"), [("rms_epsilon", struct.pack("<f", -1.0)), ("block_count", bytes(4))])
def test_a_file_over_which_llama_cpp_ends_its_process_is_refused(
    lone: Path, tmp_path: Path, key: str, value: bytes
) -> None:
    raw = bytearray(lone.read_bytes())
    place = raw.index(key.encode()) + len(key) + 4  # behind the key and its type
    raw[place : place + len(value)] = value
    file = tmp_path / "changed.gguf"
    file.write_bytes(raw)
    code, _out, err = command("generate", file, "x", "--max-new-tokens", 1)
    assert code == 4
    assert "llama.cpp" in err
    assert err.count("\n") == 1
