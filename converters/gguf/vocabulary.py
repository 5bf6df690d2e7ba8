"""The tokenizer that a GGUF file holds, as one of transformers: what `converters.gguf.tokenizer` writes, read back."""

from typing import Any

from moepress.converters.gguf.file import GgufModel
from moepress.converters.gguf.tokenizer import CONTROL, PRE_TOKENIZERS, USER, splitting
from moepress.errors import InvalidInputError, UnsupportedError


def tokenizer_of(model: GgufModel) -> Any:
    """The file's own tokenizer, a `PreTrainedTokenizerFast`.

    Raises:
        UnsupportedError: it is not one of bytes and merges, or its splitting has a name that moepress does not know.
        InvalidInputError: the file's lists do not belong together.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    kind, pre = model.keys.get("tokenizer.ggml.model"), str(model.keys.get("tokenizer.ggml.pre", ""))
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{model.file} has a tokenizer ({kind}, {pre or 'no splitting named'}) that is read from tokenizer.json "
            "only; copy that file of the original model beside it."
        )
    tokens, types, merges = (_list(model, name) for name in ("tokens", "token_type", "merges"))
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        # What a pre-tokenizer leaves whole and the vocabulary knows is one token in llama.cpp, merges or not.
        bpe = models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=pairs, ignore_merges=pre in _WHOLE)
    except Exception as error:  # a bare Exception of Rust
        raise InvalidInputError(f"{model.file} has a broken vocabulary; make or download it again.") from error
    raw = Tokenizer(bpe)
    raw.pre_tokenizer, raw.decoder = splitting(PRE_TOKENIZERS[pre]), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, types, strict=False) if k == CONTROL])
    raw.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False) if k == USER])
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    numbers = {role: model.keys.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    named = {role: tokens[n] for role, n in numbers.items() if isinstance(n, int) and 0 <= n < len(tokens)}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **named)
    _dress(made, model, named, numbers)
    template = model.keys.get("tokenizer.chat_template")
    made.chat_template = template if isinstance(template, str) else None
    return made


_WHOLE = ("llama-bpe", "gpt-4o", "tekken")
"""Splittings with which llama.cpp takes a piece that is a token as it is (`ignore_merges`)."""


def _list(model: GgufModel, name: str) -> list[Any]:
    """A list of the vocabulary, which `open_gguf` only counts."""
    from gguf import GGUFReader

    field = GGUFReader(model.file).fields.get(f"tokenizer.ggml.{name}")
    if field is None:
        raise InvalidInputError(f"{model.file} has no tokenizer.ggml.{name}; make or download it again.")
    found = field.contents()
    return found if isinstance(found, list) else [found]


def _dress(made: Any, model: GgufModel, named: dict[str, str], numbers: dict[str, Any]) -> None:
    """Tokens that a text begins and ends with, as the file says."""
    from tokenizers import processors

    ends = [
        role for role in ("bos_token", "eos_token") if role in named and model.keys.get(f"tokenizer.ggml.add_{role}")
    ]
    if not ends:
        return
    before = [named["bos_token"]] if "bos_token" in ends else []
    after = [named["eos_token"]] if "eos_token" in ends else []
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(named[role], numbers[role]) for role in ends]
    )
