"""Files to documents: the formats, and what is refused."""

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import Write, documents, texts

from moepress.calibration.documents import Document, read_documents
from moepress.calibration.sources import parse_sources
from moepress.calibration.templates import ChatTemplate
from moepress.errors import InvalidInputError

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
UNION = pa.schema(
    [("text", pa.string()), ("messages", TURNS), *((name, pa.string()) for name in ("prompt", "completion", "content"))]
)


def test_a_text_file_is_one_document_of_its_exact_text(write: Write, tokenizer: Any) -> None:
    assert texts(write("a.txt", "\ufeffeins\r\n\nzwei größer"), tokenizer) == ["eins\r\n\nzwei größer"]
    assert texts(write("a.txt.gz", gzip.compress(b"one")), tokenizer) == ["one"]


def test_a_limit_inside_a_character_cuts_before_it(write: Write, tokenizer: Any) -> None:
    path = write("a.txt", "aß😀b")
    assert [texts(path, tokenizer, limit_bytes=n)[0] for n in range(9)] == [
        "", "a", "a", "aß", "aß", "aß", "aß", "aß😀", "aß😀b"
    ]  # fmt: skip


def test_text_that_is_not_utf8_names_the_byte(write: Write, tokenizer: Any) -> None:
    path = write("latin.txt", b"ab\xe4cd")
    with pytest.raises(InvalidInputError, match=r"latin\.txt: not UTF-8 text at byte offset 2"):
        texts(path, tokenizer)
    with pytest.raises(InvalidInputError, match="byte offset 2"):
        texts(write("tail.txt", b"ab\xe4"), tokenizer)
    with pytest.raises(InvalidInputError, match=r"line 2: not UTF-8 at byte offset 15"):
        texts(write("latin.jsonl", b'{"text": "x"}\n"\xe4"\n'), tokenizer)


def test_records_of_each_kind_are_read(write: Write, chat_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records: list[dict[str, Any]] = [
        {"text": ""},
        {"text": "plain", "messages": None},
        {"messages": turns},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    expected = [
        Document(text="", rendered=False),
        Document(text="plain", rendered=False),
        Document(text="<user>hi\n<assistant>ho\n", rendered=True),
        Document(text="2+2=4", rendered=False),
        Document(text="<user>hi\n<assistant>ho\n", rendered=True),
    ]
    for path in (write("a.jsonl", lines), write("a.jsonl.gz", gzip.compress(lines.encode()))):
        assert documents(path, chat_tokenizer) == expected


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", "{}", '{"text": 3}', '{"text": null}', '{"messages": []}', '{"messages": ["x"]}',
     '{"messages": [{"content": "x"}]}', '{"prompt": "x"}', '{"prompt": "x", "completion": []}',
     '{"text": "\\ud800"}'],
)  # fmt: skip
def test_a_bad_line_is_named(line: str, write: Write, chat_tokenizer: Any) -> None:
    path = write("bad.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(InvalidInputError, match=r"bad\.jsonl, line 3: "):
        texts(path, chat_tokenizer)


def test_a_conversation_needs_a_chat_template_that_takes_it(write: Write, tokenizer: Any) -> None:
    path = write("chat.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(InvalidInputError, match=r"line 1: .* no chat template"):
        texts(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInputError, match=r"line 1: .* refuses this conversation: roles must alternate"):
        texts(path, tokenizer)


def test_parquet_columns_are_read_by_row_group(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [0, 1, 2], "text": ["a", "", "c"]}), path, row_group_size=2)
    assert texts(str(path), chat_tokenizer) == ["a", "", "c"]
    turns = [{"role": "user", "content": "hi", "name": None}]
    pq.write_table(pa.table({"messages": [turns]}), path)
    assert texts(str(path), chat_tokenizer) == ["<user>hi\n"]
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    assert texts(str(path), chat_tokenizer) == ["ab"]


def test_bad_parquet_is_refused(write: Write, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"bad\.parquet"):
        texts(write("bad.parquet", b"not parquet at all"), tokenizer)
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(InvalidInputError, match=r"null\.parquet, row 1: "):
        texts(str(tmp_path / "null.parquet"), tokenizer)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "none.parquet")
    with pytest.raises(InvalidInputError, match=r"none\.parquet, row 0: needs text"):
        texts(str(tmp_path / "none.parquet"), tokenizer)


def test_files_that_can_not_be_read_are_refused(write: Write, tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match="can not be read"):
        texts(write("a.txt.gz", b"not gzip"), tokenizer)
    with pytest.raises(InvalidInputError, match="can not be read"):
        texts(write("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9]), tokenizer)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_as_a_list_of_records_or_as_records_one_after_another(
    indent: int | None, write: Write, tokenizer: Any
) -> None:
    records = [{"text": f"größer {n} " * 40} for n in range(50)]
    listed = write("list.json", "\ufeff" + json.dumps(records, indent=indent))
    follow = write("follow.json", "\n".join(json.dumps(record, indent=indent) for record in records))
    zipped = write("list.json.gz", gzip.compress(json.dumps(records).encode()))
    for path in (listed, follow, zipped):
        assert texts(path, tokenizer) == [record["text"] for record in records]
    assert texts(write("none.json", "[]"), tokenizer) == []


def test_a_list_of_records_is_read_as_far_as_it_is_wanted(write: Write, tokenizer: Any) -> None:
    path = write("long.json", "[" + json.dumps({"text": "a" * 90_000}) + "," + json.dumps({"text": "b"}) * 2 + "]")
    with ChatTemplate(tokenizer) as chat:
        found = read_documents(Path(path), chat)
        assert next(found).text == "a" * 90_000
        assert next(found).text == "b"
    with pytest.raises(InvalidInputError, match=r"broken\.json, record 2: not a JSON object"):
        texts(write("broken.json", '[{"text": "x"}, {"text": ]'), tokenizer)
    with pytest.raises(InvalidInputError, match=r"open\.json, record 2: not a JSON object"):
        texts(write("open.json", '[{"text": "x"}'), tokenizer)


def test_csv_is_read_by_its_line_of_names(write: Write, tokenizer: Any) -> None:
    table = 'id,text\r\n1,"one, two\nthree"\r\n2,größer\r\n'
    assert texts(write("a.csv", "\ufeff" + table), tokenizer) == ["one, two\nthree", "größer"]
    assert texts(write("a.csv.gz", gzip.compress(table.encode())), tokenizer) == ["one, two\nthree", "größer"]
    assert texts(write("b.csv", "prompt;completion\n2+2=;4\n"), tokenizer) == ["2+2=4"]
    assert texts(write("b.tsv", "prompt\tcompletion\n2+2=\t4\n"), tokenizer) == ["2+2=4"]
    with pytest.raises(InvalidInputError, match=r"c\.csv: needs text, .*; its columns are id, label"):
        texts(write("c.csv", "id,label\n1,x\n"), tokenizer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (gzip.compress(b"text", mtime=0), r"let its name end in \.gz"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x89PNG\r\n", "a picture"),
        (b"\xff\xd8\xff\xe0", "a picture"),
        (b"PAR1rest", r"let its name end in \.parquet"),
        (b"ARROW1rest", "write it as Parquet"),
        ("text".encode("utf-16"), "convert it to UTF-8"),
        (b"ab\0cd", "NUL bytes, .* byte offset 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.bin"])
def test_what_is_no_text_is_refused_by_name(
    name: str, content: bytes, words: str, write: Write, tokenizer: Any
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        texts(write(name, content), tokenizer)


def test_a_pipe_a_socket_and_a_device_are_refused_before_they_are_opened(tmp_path: Path, tokenizer: Any) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
        for path, kind in (
            (tmp_path / "pipe.jsonl", "pipe"),
            (tmp_path / "s.txt", "socket"),
            (Path("/dev/null"), "dev"),
        ):
            with pytest.raises(InvalidInputError, match=f"is a.*{kind}.* not a plain file"):
                texts(str(path), tokenizer)
            with pytest.raises(InvalidInputError, match=f"is a.*{kind}.* not a plain file"):
                parse_sources([str(path)], ())
            with pytest.raises(InvalidInputError, match=f"is a.*{kind}.* not a plain file"):
                parse_sources((), [f"x={path}"])


def test_byte_order_marks_and_line_ends_of_windows_are_no_part_of_records(write: Write, tokenizer: Any) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert texts(path, tokenizer) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '{"text": ' + "9" * 5000 + "}",
        '{"text": "\\ud800"}',
        '{"text": 1e999}',
    ],
)
def test_depth_digits_and_surrogates_end_in_a_sentence(name: str, record: str, write: Write, tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"(line|record) 1: "):
        texts(write(name, record), tokenizer)


def test_a_record_is_cut_before_anything_else_is_done_to_it(write: Write, chat_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "ß" * 5000}]
    lines = [json.dumps({"text": "ß" * 5000}), json.dumps({"messages": turns}), json.dumps({"text": "ß"})]
    found = documents(write("a.jsonl", "\n".join(lines)), chat_tokenizer, limit_bytes=1001)
    assert [len(document.text.encode()) for document in found] == [1000, 1000, 2]
    assert [document.cut for document in found] == [True, True, False]


def test_rows_of_a_union_of_data_sets_are_read_by_what_they_have(tmp_path: Path, chat_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"text": "a"}, {"messages": turns}, {"prompt": "2+2=", "completion": "4"}, {"content": "code"}]
    pq.write_table(pa.Table.from_pylist(rows, schema=UNION), tmp_path / "a.parquet")
    assert texts(str(tmp_path / "a.parquet"), chat_tokenizer) == ["a", "<user>hi\n", "2+2=4", "code"]


def test_documents_before_a_bad_record_are_given_first(write: Write, chat_tokenizer: Any) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    with ChatTemplate(chat_tokenizer) as chat:
        found = read_documents(Path(write("a.jsonl", f"{good}\n{good}\nbad\n")), chat)
        assert [next(found).text, next(found).text] == ["<user>hi\n"] * 2
        with pytest.raises(InvalidInputError, match="line 3"):
            next(found)
