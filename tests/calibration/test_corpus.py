"""Text to token windows: the sources, the readers, the choice of windows, the evaluation convention and its bytes."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import moepress.models.demo
from moepress.calibration import sources as sources_module
from moepress.calibration.corpus import build_corpus, evaluation_windows
from moepress.calibration.sources import (
    Document,
    Source,
    embedded_sources,
    parse_sources,
    read_documents,
    source_files,
)
from moepress.errors import InvalidInputError, UsageError

DEMO = Path(str(moepress.models.demo.__file__)).parent
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
WORDS = ["the river", "runs", "from 1847", "to the sea,", "und größer", "als", "∑ x = y", "why?\n", "naïve 😀"]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prose(seed: int, words: int = 1500) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


Write = Callable[[str, str | bytes], str]


def texts(path: str, tokenizer: Any, **options: Any) -> list[str]:
    return [document.text for document in read_documents(Path(path), tokenizer, **options)]


# --- sources ---------------------------------------------------------------------------------------------------------


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


# --- readers ---------------------------------------------------------------------------------------------------------


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
        assert list(read_documents(Path(path), chat_tokenizer)) == expected


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
    with pytest.raises(InvalidInputError, match=r"name it \.jsonl"):
        texts(write("a.json", "[]"), tokenizer)
    with pytest.raises(InvalidInputError, match="can not be read"):
        texts(write("a.txt.gz", b"not gzip"), tokenizer)
    with pytest.raises(InvalidInputError, match="can not be read"):
        texts(write("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9]), tokenizer)


# --- build_corpus ----------------------------------------------------------------------------------------------------


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
    assert corpus.notes == ()


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


# --- evaluation_windows ----------------------------------------------------------------------------------------------


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
