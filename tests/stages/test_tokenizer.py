"""Tokenizers: the ids of tokenizer.json, and a sentence for each way in which there is none to be had."""

import base64
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.stages.groundwork import load_corpus, load_tokenizer
from moepress.stages.places import Calibration
from moepress.stages.subjects import tokenizer_folder
from moepress.stages.tokenizer import read_tokenizer

TEXT = "In 1234567 years of 2026, 20000 leagues\n\n    def f(x): return x+12345  # don't"
PATTERN = r"\p{N}{1,3}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"  # digits in threes
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def trained() -> Tokenizer:
    """A byte-level tokenizer that cuts digits in threes, with numbers in its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    numbers = " ".join(str(n) for n in range(100, 400))
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([numbers * 3, TEXT], trainer)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained().save(str(tmp_path / "tokenizer.json"))
    configure(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    return tmp_path


def configure(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))


def refusal(folder: Path, error: type[MoepressError]) -> str:
    with pytest.raises(error) as caught:
        read_tokenizer(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizer", None])
def test_ids_are_those_of_the_file_whatever_class_is_named(folder: Path, name: str | None) -> None:
    configure(folder, **({"tokenizer_class": name} if name else {}))
    raw, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), read_tokenizer(folder).tokenizer
    for text in (TEXT, "1234567890", "  a\n\n b", "日本語 ﬁ"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == raw.decode(ids)


def test_a_class_that_gives_other_ids_is_said_and_one_that_does_not_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_tokenizer(folder).notes == ()
    configure(folder, tokenizer_class="GPT2Tokenizer")
    (note,) = read_tokenizer(folder).notes
    assert "as GPT2Tokenizer, which gives other token ids than the file itself" in note
    load_tokenizer(folder)
    assert note in capsys.readouterr().err
    corpus = load_corpus(folder, Calibration(tokens=256, window=32), context=64, vocabulary=700)
    assert note.rstrip(".") in corpus.notes
    assert capsys.readouterr().err == ""  # said once, however many stages read it


def test_tokens_that_only_the_config_adds_keep_their_ids(folder: Path) -> None:
    size = trained().get_vocab_size()
    added = {str(size): {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
    added[str(size)]["single_word"] = False
    configure(folder, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added)
    tokenizer = read_tokenizer(folder).tokenizer
    assert tokenizer("123<|end|>", add_special_tokens=False)["input_ids"][-1] == size


def test_a_tokenizer_that_needs_code_says_how_to_convert_it(tmp_path: Path) -> None:
    """As of Moonlight and Kimi-K2."""
    ranks = "\n".join(f"{base64.b64encode(bytes([n])).decode()} {n}" for n in range(256))
    (tmp_path / "tiktoken.model").write_text(ranks)
    (tmp_path / "tokenization_moonshot.py").write_text("raise SystemExit('this code ran')\n")
    configure(
        tmp_path,
        tokenizer_class="TikTokenTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    )
    message = refusal(tmp_path, UnsupportedError)
    assert "needs code of its own (tokenization_moonshot.py), which moepress never runs" in message
    assert "docs/faq.md" in message
    trained().save(str(tmp_path / "tokenizer.json"))  # what the guide makes
    found = read_tokenizer(tmp_path)
    assert "code" in found.notes[0]
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.tokenizer(TEXT)["input_ids"] == raw.encode(TEXT).ids


def test_a_file_that_can_be_read_is_enough_where_the_rest_can_not(folder: Path) -> None:
    """transformers reads config.json on the way, and ends at a dtype that is an error of torch."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "torch_dtype": "torch.bfloat16"}))
    configure(folder, tokenizer_class=None)
    found = read_tokenizer(folder)
    assert found.tokenizer(TEXT)["input_ids"] == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert "tokenizer.json is used alone" in found.notes[0]


def test_sentencepiece_alone_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else real(name))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    configure(tmp_path, tokenizer_class="LlamaTokenizer")
    assert "pip install sentencepiece" in refusal(tmp_path, UnsupportedError)


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    configure(tmp_path)
    assert "has no tokenizer (no tokenizer.json" in refusal(tmp_path, InvalidInputError)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_told_from_a_broken_tokenizer(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    message = refusal(folder, InvalidInputError)
    assert f"{folder / name} is a Git LFS pointer" in message


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model": {"type": "None"}}'])
def test_a_broken_file_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert str(folder / "tokenizer.json") in refusal(folder, InvalidInputError)


@pytest.mark.parametrize("number", [2**24 + 1, 2**31, 2**32 - 1, 2**63, -1])
def test_a_token_whose_id_no_vocabulary_reaches_is_refused_at_once(folder: Path, number: int) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = {"a": 0, "b": number}
    values["model"]["merges"] = []
    file.write_text(json.dumps(values))
    before = time.thread_time()
    assert str(file) in refusal(folder, InvalidInputError)
    assert time.thread_time() - before < 5


def test_the_first_folder_with_a_tokenizer_is_taken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    without = tmp_path_factory.mktemp("without")
    assert tokenizer_folder([without, folder]) == folder
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        tokenizer_folder([without])
