"""A tokenizer of bytes, for tiny vocabularies."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NEVER = "\u00ff"
"""The character of the byte 0xFF, which no UTF-8 text has."""


def byte_tokenizer(folder: Path, *, merges: bool = False) -> None:
    """Text as its bytes: ids below 256, as tiny vocabularies want them; with `merges` one pair of them is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if merges:  # llama.cpp takes no vocabulary without any
        alphabet = [character for character in alphabet if character != NEVER] + ["th"]
    pairs = [("t", "h")] if merges else []
    tokenizer = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
