"""Tokens of long texts: those of the whole text, whatever pieces it is tokenized in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import prose
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moepress.calibration.tokens import TokenFile, pieces
from moepress.errors import MoepressError

SPECIAL = ["<s>", "</s>", "<unk>"]
TEXTS = {
    "prose": prose(0, 4000),
    "spaces": ("word" + " " * 300 + "\n\n\t" * 50) * 60,
    "one word": "ab" * 9000,
    "special": (prose(3, 20) + "</s><s>") * 200,
    "emoji": "😀é日本" * 3000,
}


def fast(kind: str) -> Any:
    sample = [prose(1, 3000), TEXTS["emoji"][:400]]
    if kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        raw.train_from_iterator(
            sample, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
        )
    else:  # as Llama's and Mixtral's: one word from end to end, with a blank before it
        raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
        split = [part for text in sample for part in text.split(" ")]
        raw.train_from_iterator(split, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "unigram", "words"])
def test_tokens_of_pieces_are_those_of_the_whole_text(kind: str, text: str, tokenizer: Any) -> None:
    used, whole = tokenizer if kind == "bytes" else fast(kind), TEXTS[text]
    for special in (True, False):
        expected = used(whole, add_special_tokens=special, return_offsets_mapping=True)
        found = list(pieces(used, whole, special=special, piece_chars=2048))
        assert np.concatenate([piece.ids for piece in found]).tolist() == expected["input_ids"]
        ends = np.maximum.accumulate([end for _, end in expected["offset_mapping"]])
        at = np.cumsum([0, *(len(character.encode()) for character in whole)])
        assert np.concatenate([piece.ends for piece in found]).tolist() == at[ends].tolist()
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
        assert len(found) > 3 or text != "prose"


def test_a_text_without_a_seam_is_tokenized_whole(tokenizer: Any) -> None:
    text = "".join(chr(0x4E00 + n % 7) for n in range(9000))
    found = list(pieces(tokenizer, text, piece_chars=512))
    assert np.concatenate([piece.ids for piece in found]).tolist() == tokenizer(text)["input_ids"]


def test_a_short_text_is_tokenized_by_the_tokenizer_alone(tokenizer: Any) -> None:
    (found,) = pieces(tokenizer, "größer 😀")
    assert found.ids.tolist() == tokenizer("größer 😀")["input_ids"]
    (empty,) = pieces(tokenizer, "", special=False)
    assert (len(empty.ids), len(empty.ends), empty.last) == (0, 0, True)


def test_a_token_file_holds_what_was_put_into_it_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokens = TokenFile()
    assert tokens.array().tolist() == []
    for start in range(0, 1000, 100):
        tokens.append(np.arange(start, start + 100, dtype=np.int32))
    found = tokens.array()
    assert found.tolist() == list(range(1000))
    tokens.append(found[:500])
    assert tokens.array()[1000:].tolist() == list(range(500))
    assert found.tolist() == list(range(1000))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenFile()

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "_file", Full())
    with pytest.raises(MoepressError, match=r"no room for the tokens of the text \(No space left"):
        tokens.append(np.zeros(3, dtype=np.int32))
    assert tokens.count == 0
