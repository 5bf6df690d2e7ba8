"""Windows of evaluation text: the convention of the GPTQ papers, and the bytes that they score."""

import json
from typing import Any

import pytest
import torch
from texts import Write, prose
from tokenizers.processors import TemplateProcessing

from moepress.calibration.corpus import evaluation_windows
from moepress.calibration.sources import parse_sources


def slow_convention(documents: list[str], tokenizer: Any, window: int) -> tuple[list[list[int]], list[int]]:
    """The convention and the bytes of its windows, by loops; a character's bytes count where its first token ends."""
    text = "\n\n".join(documents)
    encoded = tokenizer(text, return_offsets_mapping=True)
    rows, sizes = [], []
    for start in range(0, len(encoded["input_ids"]) - window + 1, window):
        rows.append(encoded["input_ids"][start : start + window])
        offsets = encoded["offset_mapping"][start : start + window]
        sizes.append(len(text[offsets[0][1] : offsets[-1][1]].encode()))
    return rows, sizes


def test_evaluation_follows_the_gptq_convention(write: Write, tokenizer: Any) -> None:
    documents = ["", prose(0, 300), "", "", prose(1, 400), ""]
    path = write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = evaluation_windows(parse_sources([path], ()), tokenizer, window=64)
    rows, sizes = slow_convention(documents, tokenizer, 64)
    assert corpus.windows.tolist() == rows
    assert corpus.window_bytes.tolist() == sizes
    assert corpus.window_bytes.dtype == torch.int64
    assert (corpus.documents, corpus.bytes_exact, corpus.notes) == ((6,), True, ())
    assert corpus.windows[0, 0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in corpus.windows.flatten()[1:].tolist()


def test_bytes_of_windows_and_first_tokens_add_up_to_the_text(write: Write, tokenizer: Any) -> None:
    text = prose(5, 600).encode("ascii", "ignore").decode()
    corpus = evaluation_windows(parse_sources([write("a.txt", text)], ()), tokenizer, window=50)
    # In ASCII text each character is a byte and each token of this byte-level vocabulary is as long as its bytes.
    sizes = [[len(t) for t in tokenizer.convert_ids_to_tokens(row)] for row in corpus.windows.tolist()]
    assert corpus.window_bytes.tolist() == [sum(row[1:]) for row in sizes]
    first = sum(row[0] for row in sizes[1:])  # the first window begins with BOS, which covers nothing
    end = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][corpus.windows.numel() - 1][1]
    assert int(corpus.window_bytes.sum()) + first == len(text[:end].encode())


def test_bytes_of_characters_split_over_tokens_are_off_by_less_than_a_character(write: Write, tokenizer: Any) -> None:
    text = "größer ∑ 😀 naïve " * 200
    corpus = evaluation_windows(parse_sources([write("a.txt", text)], ()), tokenizer, window=20)
    for row, size in zip(corpus.windows.tolist(), corpus.window_bytes.tolist(), strict=True):
        exact = sum(len(token) for token in tokenizer.convert_ids_to_tokens(row[1:]))  # one letter stands for a byte
        assert abs(size - exact) <= 3


def test_an_end_token_covers_no_bytes(write: Write, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 1)]
    )
    text = "2 + 2 = 4, " * 40
    length = len(tokenizer(text)["input_ids"])
    corpus = evaluation_windows(parse_sources([write("a.txt", text)], ()), tokenizer, window=length)
    assert corpus.windows[0, -1] == tokenizer.eos_token_id
    assert corpus.bos_policy == "tokenizer default: adds EOS"
    assert corpus.window_bytes.tolist() == [len(text) - 1]  # the first token is not predicted


def test_max_windows_gives_the_first_windows_of_each_domain(write: Write, tokenizer: Any) -> None:
    blank = write("blank.txt", "word" + " " * 30_000 + prose(2, 4000))  # tokens that cover much text: read again
    found = parse_sources([write("long.txt", prose(0, 6000)), blank, write("short.txt", prose(1, 60))], ())
    whole = evaluation_windows(found, tokenizer, window=32)
    part = evaluation_windows(found, tokenizer, window=32, max_windows=5)
    counts = [int((part.domain_index == d).sum()) for d in range(3)]
    assert counts[:2] == [5, 5]
    for d, count in enumerate(counts):
        mine, all_mine = part.domain_index == d, whole.domain_index == d
        assert torch.equal(part.windows[mine], whole.windows[all_mine][:count])
        assert torch.equal(part.window_bytes[mine], whole.window_bytes[all_mine][:count])


def test_a_tokenizer_without_offsets_counts_decoded_bytes_and_says_so(write: Write, tokenizer: Any) -> None:
    class Slow:
        is_fast = False
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text: str, *, return_offsets_mapping: bool = False, **options: Any) -> Any:
            assert not return_offsets_mapping
            return tokenizer(text, **options)

        def decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

        def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
            raise AssertionError

    found = parse_sources([write("a.txt", prose(5, 600).encode("ascii", "ignore"))], ())
    fast, slow = evaluation_windows(found, tokenizer, window=50), evaluation_windows(found, Slow(), window=50)
    assert slow.window_bytes[1:].tolist() == fast.window_bytes[1:].tolist()
    assert not slow.bytes_exact
    assert "no offsets" in slow.notes[0]


def test_each_file_of_a_domain_is_measured_in_proportion_to_its_size(write: Write, tokenizer: Any) -> None:
    sizes = {"a": 4000, "b": 8000, "c": 10}
    found = parse_sources((), [f"x={write(f'{c}.txt', f'{c} ' * n)}" for c, n in sizes.items()])
    corpus = evaluation_windows(found, tokenizer, window=32, max_windows=12)
    text = tokenizer.decode(corpus.windows.flatten().tolist())
    assert corpus.windows.shape == (12, 32)
    assert text.count("b") / text.count("a") == pytest.approx(2, rel=0.3)
    assert text.count("c") == 10
    assert corpus.notes == (
        "domain x: 12 windows were measured, the beginning of each of its 3 files; the rest was not read",
    )
    for row, size in zip(corpus.windows.tolist(), corpus.window_bytes.tolist(), strict=True):
        assert abs(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) - size) <= 2


def test_files_that_are_measured_whole_are_one_text_without_notes(write: Write, tokenizer: Any) -> None:
    texts = [prose(n, 60) for n in range(3)]
    found = parse_sources((), [f"x={write(f'{n}.txt', text)}" for n, text in enumerate(texts)])
    rows, sizes = slow_convention(texts, tokenizer, 32)
    for most in (None, 500):
        corpus = evaluation_windows(found, tokenizer, window=32, max_windows=most)
        assert corpus.windows.tolist() == rows
        assert corpus.window_bytes.tolist() == sizes
        assert corpus.notes == ()


def test_windows_of_a_long_record_are_those_of_its_text(write: Write, tokenizer: Any) -> None:
    text = prose(0, 60_000)
    record, plain = write("record.jsonl", json.dumps({"text": text})), write("plain.txt", text)
    one, other = (
        evaluation_windows(parse_sources([p], ()), tokenizer, window=64, max_windows=4) for p in (record, plain)
    )
    assert torch.equal(one.windows, other.windows)
    assert torch.equal(one.window_bytes, other.window_bytes)
    assert one.notes == ("domain record: 4 windows were measured, the beginning of its text; the rest was not read",)
