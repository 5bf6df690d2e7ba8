"""What is read of a domain: all of its files, in proportion, and what is said of the rest."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import Write, prose

from moepress.calibration import pools
from moepress.calibration.corpus import build_corpus
from moepress.calibration.documents import read_documents
from moepress.calibration.pools import Pool, dealt
from moepress.calibration.sources import Source, parse_sources
from moepress.calibration.templates import ChatTemplate
from moepress.calibration.tokens import TokenFile
from moepress.errors import InvalidInputError


def pool_of(sources: tuple[Source, ...], tokenizer: Any, room: int, *, window: int = 32, seed: int = 0) -> Pool:
    with ChatTemplate(tokenizer) as chat:
        return Pool("x", sources, tokenizer, chat, TokenFile(), room_tokens=room, window=window, seed=seed)


def letters(tokens: np.ndarray[Any, Any], tokenizer: Any) -> Counter[str]:
    return Counter(character for character in tokenizer.decode(tokens.tolist()) if character in "abcdefgh")


@pytest.mark.parametrize("seed", range(4))
def test_each_file_of_a_domain_gives_a_part_in_proportion_to_its_size(seed: int, write: Write, tokenizer: Any) -> None:
    found = parse_sources(
        (), [f"x={write(f'{c}.txt', f'{c} ' * n)}" for c, n in (("a", 4000), ("b", 8000), ("c", 4000))]
    )
    pool = pool_of(found, tokenizer, 2048, seed=seed)
    assert len(pool.tokens) == 2048
    counts = letters(pool.tokens, tokenizer)
    assert counts["b"] / counts["a"] == pytest.approx(2, rel=0.1)
    assert counts["b"] / counts["c"] == pytest.approx(2, rel=0.1)
    (note,) = pool.notes
    assert "the first 2,048 tokens of 3 of its 3 files, in proportion to their sizes; the rest was not read" in note


def test_what_a_file_lacks_the_others_give(write: Write, tokenizer: Any) -> None:
    sizes = {"a": 20, "b": 9000, "c": 9000}
    found = parse_sources((), [f"x={write(f'{c}.txt', f'{c} ' * n)}" for c, n in sizes.items()])
    pool = pool_of(found, tokenizer, 1024)
    counts = letters(pool.tokens, tokenizer)
    assert counts["a"] == 20
    assert abs(counts["b"] - counts["c"]) < 100
    assert len(pool.tokens) > 1024 - 32


def test_records_and_plain_text_share_a_domain(write: Write, tokenizer: Any) -> None:
    lines = "".join(json.dumps({"text": "b " * 50}) + "\n" for _ in range(100))
    paths = [write("a.txt", "a " * 5500), write("b.jsonl", lines), write("empty.txt", "")]
    pool = pool_of(parse_sources((), [f"x={path}" for path in paths]), tokenizer, 1024)
    counts = letters(pool.tokens, tokenizer)
    assert counts["a"] > 300
    assert counts["b"] > 300


def test_files_that_all_fit_are_read_whole_in_the_order_of_the_seed(write: Write, tokenizer: Any) -> None:
    texts = [prose(seed, 60) for seed in range(4)]
    found = parse_sources((), [f"x={write(f'{n}.txt', text)}" for n, text in enumerate(texts)])
    pool = pool_of(found, tokenizer, 100_000)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(pool.tokens) == sum(map(len, ids))
    assert pool.notes == ()
    tokens = pool.tokens.tolist()
    assert all(any(tokens[at : at + len(part)] == part for at in range(len(tokens))) for part in ids)
    assert pool.documents == 4


def test_of_more_files_than_there_is_room_for_the_seed_chooses(write: Write, tokenizer: Any) -> None:
    found = parse_sources((), [f"x={write(f'{n}.txt', prose(n, 100))}" for n in range(20)])
    pool = pool_of(found, tokenizer, 256)
    (note,) = pool.notes
    assert "8 of its 20 files" in note
    assert "nothing of" in note


def test_many_small_files_are_read_whole_until_there_is_enough(write: Write, tokenizer: Any) -> None:
    found = parse_sources((), [f"x={write(f'{n}.txt', prose(n, 4))}" for n in range(60)])
    whole = pool_of(found, tokenizer, 100_000, window=64)
    half = len(whole.tokens) // 2
    pool = pool_of(found, tokenizer, half, window=64)
    assert half - 64 < len(pool.tokens) <= half
    assert whole.tokens.tolist()[: len(pool.tokens) - 64] == pool.tokens.tolist()[: len(pool.tokens) - 64]


def test_a_bad_record_counts_only_where_it_is_reached(write: Write, tokenizer: Any) -> None:
    good = json.dumps({"text": prose(0, 300)}) + "\n"
    found = parse_sources((), [f"x={write(f'{n}.jsonl', good * 3 + 'bad')}" for n in range(2)])
    assert len(pool_of(found, tokenizer, 512).tokens) == 512
    with pytest.raises(InvalidInputError, match="line 4"):
        pool_of(found, tokenizer, 100_000)


def test_no_file_stays_open_however_many_domains_there_are(write: Write, tokenizer: Any) -> None:
    lines = "".join(json.dumps({"text": prose(n, 40)}) + "\n" for n in range(20))
    found = parse_sources([write(f"{n}.jsonl", lines) for n in range(40)], ())
    before = len(psutil.Process().open_files())
    corpus = build_corpus(found, tokenizer, tokens=40 * 32, window=32, seed=0)
    assert len(corpus.notes) == 40
    assert len(psutil.Process().open_files()) <= before + 1


def test_of_many_long_files_no_more_is_held_than_of_one(
    write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def read(path: Path, chat: ChatTemplate, **options: Any) -> Any:
        for document in read_documents(path, chat, **options):
            held.append(len(document.text))
            yield document

    monkeypatch.setattr(pools, "read_documents", read)
    found = parse_sources((), [f"x={write(f'{n}.txt', 'word ' * 20_000)}" for n in range(30)])
    pool_of(found, tokenizer, 6400)
    assert len(held) == 30
    assert sum(held) < 2 * 4 * 6400 + 2 * 4 * 6400  # it would be 30 times 4 * 6400


def test_a_corpus_of_two_files_of_one_domain_shows_both(write: Write, tokenizer: Any) -> None:
    found = parse_sources((), [f"x={write(f'{c}.txt', f'{c} ' * 9000)}" for c in "ab"])
    corpus = build_corpus(found, tokenizer, tokens=64 * 16, window=16, seed=0)
    counts = letters(corpus.windows.numpy().reshape(-1), tokenizer)
    assert counts["a"] / (counts["a"] + counts["b"]) == pytest.approx(0.5, abs=0.2)
    assert len(corpus.notes) == 1


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.integers(0, 500))
def test_windows_are_dealt_in_proportion_and_all_of_them(sizes: list[int], more: int) -> None:
    windows = len(sizes) + more
    counts = dealt(windows, sizes)
    assert sum(counts) == windows
    assert min(counts) >= 1
    if sum(sizes):
        exact = [windows * size / sum(sizes) for size in sizes]
        assert all(count <= max(1, part + 1) for count, part in zip(counts, exact, strict=True))
