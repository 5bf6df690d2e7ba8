"""Windows of calibration text: which are chosen, in what parts, and what is said about it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import corpus_of
from texts import DEMO, Write, prose

from moepress.calibration import corpus as corpus_module
from moepress.calibration.corpus import build_corpus, evaluation_windows, sampled
from moepress.calibration.sources import Split, embedded_sources, parse_sources
from moepress.errors import InvalidInputError, UsageError

SPLITS: tuple[Split, ...] = ("calibration", "evaluation")


def test_a_corpus_is_the_same_for_a_seed_and_differs_between_seeds(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write(f"{d}.txt", prose(i)) for i, d in enumerate("ab")], ())
    one, again, other = (build_corpus(found, tokenizer, tokens=640, window=32, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.windows, again.windows)
    assert one.digest == again.digest
    assert one.digest != other.digest
    assert one.windows.dtype == one.domain_index.dtype == torch.int64
    assert not one.embedded


def test_the_seed_says_which_files_of_a_domain_are_read(write: Write, tokenizer: Any) -> None:
    texts_of = {seed: prose(seed, words=200) for seed in range(12)}
    found = parse_sources((), [f"a={write(f'{i}.txt', text)}" for i, text in texts_of.items()])
    firsts = set()
    for seed in range(6):
        corpus = build_corpus(found, tokenizer, tokens=32, window=32, seed=seed)
        row = tokenizer.decode(corpus.windows[0], skip_special_tokens=True)[3:-3]  # a window may begin inside a letter
        firsts.add(next(i for i, text in texts_of.items() if row in text))
    assert len(firsts) > 1


def test_windows_are_cuts_of_packed_documents_without_repeats(write: Write, tokenizer: Any) -> None:
    documents = [prose(seed, words=40) for seed in range(30)]
    path = write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in [*documents, " \n"]))
    corpus = build_corpus(parse_sources([path], ()), tokenizer, tokens=512, window=16, seed=3)
    packed = torch.tensor([token for text in documents for token in tokenizer(text)["input_ids"]])
    cut = [tuple(row) for row in packed[: len(packed) // 16 * 16].view(-1, 16).tolist()]
    chosen = [tuple(row) for row in corpus.windows.tolist()]
    assert len(chosen) == 32
    assert all(row in cut for row in chosen)
    assert len({cut.index(row) for row in chosen}) == len(set(chosen))
    assert chosen != cut[:32]
    assert corpus.bos_policy == "tokenizer default: adds BOS"


def test_domains_have_equal_shares_spread_evenly(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write(f"{d}.txt", prose(i)) for i, d in enumerate("abc")], ())
    corpus = build_corpus(found, tokenizer, tokens=24 * 32, window=32, seed=0)
    assert corpus.domains == ("a", "b", "c")
    assert corpus.tokens_per_domain == (256, 256, 256)
    assert corpus.domain_index.tolist() == [0, 1, 2] * 8
    assert corpus.documents == (1, 1, 1)
    assert [note.partition(":")[0] for note in corpus.notes] == ["domain a", "domain b", "domain c"]
    assert all("the rest of it was not read" in note for note in corpus.notes)


def test_a_short_domain_gives_what_it_has_and_others_the_rest(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write("long.txt", prose(0)), write("short.txt", prose(1, words=40))], ())
    corpus = build_corpus(found, tokenizer, tokens=1280, window=32, seed=0)
    short = len(tokenizer(prose(1, words=40))["input_ids"]) // 32
    assert corpus.tokens_per_domain == (1280 - 32 * short, 32 * short)
    assert corpus.notes == (f"domain short has text for {short} of the 20 windows of its equal part",)


def test_too_little_text_in_all_is_noted(write: Write, tokenizer: Any) -> None:
    corpus = build_corpus(parse_sources([write("a.txt", prose(0, 60))], ()), tokenizer, tokens=6400, window=32, seed=0)
    assert corpus.notes[-1] == f"the text gives {corpus.windows.numel()} of the 6400 tokens asked for"


def test_conversations_get_no_special_tokens_but_the_templates(write: Write, chat_tokenizer: Any) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": prose(0, 50)}]})
    corpus = build_corpus(
        parse_sources([write("a.jsonl", f"{line}\n" * 9)], ()), chat_tokenizer, tokens=320, window=32, seed=0
    )
    assert chat_tokenizer.bos_token_id not in corpus.windows.flatten().tolist()
    assert corpus.bos_policy.endswith("conversations: as the chat template writes them")


def test_a_long_source_is_read_only_as_far_as_needed(write: Write, tokenizer: Any) -> None:
    record = json.dumps({"text": prose(0, 50)}) + "\n"
    path = write("a.jsonl", record * 200 + "not json\n")
    corpus = build_corpus(parse_sources([path], ()), tokenizer, tokens=320, window=32, seed=0)
    assert corpus.documents[0] < 200
    text = write("b.txt", prose(0, 20_000).encode() + b"\xff")
    assert build_corpus(parse_sources([text], ()), tokenizer, tokens=320, window=32, seed=0).windows.shape == (10, 32)


def test_a_corpus_of_embedded_text_says_so(tokenizer: Any) -> None:
    corpus = build_corpus(embedded_sources("calibration"), tokenizer, tokens=8 * 64, window=64, seed=0)
    assert corpus.embedded
    assert corpus.domains == ("german", "math", "wiki", "python")
    assert corpus.tokens_per_domain == (128, 128, 128, 128)


def test_requests_that_can_not_be_met_are_refused(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write("a.txt", "tiny"), write("b.txt", prose(0))], ())
    with pytest.raises(InvalidInputError, match=r"domain 'a' has \d+ tokens of text, less than one window of 32"):
        build_corpus(found, tokenizer, tokens=320, window=32, seed=0)
    with pytest.raises(InvalidInputError, match="domain 'a'"):
        evaluation_windows(found, tokenizer, window=32)
    for tokens, window in ((63, 32), (100, 0)):
        with pytest.raises(UsageError, match="less than one window"):
            build_corpus(found, tokenizer, tokens=tokens, window=window, seed=0)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        evaluation_windows(found, tokenizer, window=1)
    with pytest.raises(InvalidInputError, match="no text was given"):
        build_corpus((), tokenizer, tokens=320, window=32, seed=0)


def test_a_tokenizer_of_another_model_is_refused(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write("a.txt", prose(0))], ())
    highest = int(
        build_corpus(found, tokenizer, tokens=320, window=32, seed=0, vocab_size=len(tokenizer)).windows.max()
    )
    with pytest.raises(
        InvalidInputError, match=f"token id {highest}, but .* {highest} entries.*do not belong together"
    ):
        build_corpus(found, tokenizer, tokens=320, window=32, seed=0, vocab_size=highest)
    with pytest.raises(InvalidInputError, match="do not belong together"):
        evaluation_windows(found, tokenizer, window=32, vocab_size=9)


def test_text_that_is_read_to_its_end_has_no_notes(write: Write, tokenizer: Any) -> None:
    found = parse_sources([write(f"{d}.txt", prose(i, 300)) for i, d in enumerate("abc")], ())
    assert build_corpus(found, tokenizer, tokens=24 * 32, window=32, seed=0).notes == ()


def test_windows_of_the_embedded_prose_stay_what_they_were(tokenizer: Any) -> None:
    """Documented figures rest on them. (The embedded Python differs between Python's versions.)"""
    parts = {split: [s for s in embedded_sources(split) if s.domain != "python"] for split in SPLITS}
    for seed, digest in ((0, "f95059821bd04ec9"), (1, "706416f649a87218")):
        corpus = build_corpus(parts["calibration"], tokenizer, tokens=8192, window=128, seed=seed)
        assert corpus.digest.startswith(digest)
    measured = evaluation_windows(parts["evaluation"], tokenizer, window=128, max_windows=8)
    assert measured.digest.startswith("74104b20202d8cb4")


def test_windows_that_are_many_are_in_a_file_and_the_same(
    write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parse_sources([write(f"{d}.txt", prose(i)) for i, d in enumerate("ab")], ())
    before = build_corpus(found, tokenizer, tokens=640, window=32, seed=0)
    monkeypatch.setattr(corpus_module, "MAPPED_BYTES", 64)
    after = build_corpus(found, tokenizer, tokens=640, window=32, seed=0)
    assert after.digest == before.digest
    assert torch.equal(after.windows, before.windows)


LEAN = """
import json, resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from moepress.calibration.corpus import build_corpus, evaluation_windows
from moepress.calibration.sources import parse_sources
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
def grown(path, tokens):
    found, before = parse_sources([path], ()), peak()
    build_corpus(found, tokenizer, tokens=tokens, window=256, seed=0)
    evaluation_windows(found, tokenizer, window=256, max_windows=tokens // 256)
    return peak() - before
build_corpus(parse_sources([sys.argv[4]], ()), tokenizer, tokens=512, window=256, seed=0)
print(json.dumps([grown(sys.argv[2], 2048), grown(sys.argv[3], 65536)]))
"""


def test_memory_is_bounded_by_the_tokens_wanted_and_not_by_the_record(write: Write, tmp_path: Path) -> None:
    long = write("long.jsonl", json.dumps({"text": prose(0, 400_000)}) + "\n")
    plain, small = write("plain.txt", prose(1, 400_000)), write("small.txt", prose(2, 2000))
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(DEMO), long, plain, small], capture_output=True, text=True, check=True
    )
    of_record, of_text = json.loads(done.stdout)
    assert of_record < 60  # MiB; it was 205 for each MB of the record's 2.4
    assert of_text < 110  # it was 360: the pool's 2 MB at 180 a MB


def test_every_domain_has_its_share_of_the_sample_though_domains_take_turns() -> None:
    windows = torch.arange(64)[:, None].expand(-1, 8)
    corpus = corpus_of(windows, windows[:, 0] % 4, ("a", "b", "c", "d"))
    taken = sampled(corpus, 16 * 8)[:, 0]
    assert (taken % 4).bincount().tolist() == [4, 4, 4, 4]
    assert taken.tolist() == sorted(set(taken.tolist()))
    assert len(sampled(corpus, 1)) == 1
    assert torch.equal(sampled(corpus, 10**6), windows)
