"""A tokenizer of bytes, for tiny vocabularies."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(folder: Path) -> None:
    """Text as its bytes: ids below 256, as tiny vocabularies want them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
