"""A folder's tokenizer as GGUF's metadata: from tokenizer.json alone, with a pre-tokenizer that is proved.

llama.cpp splits text by regular expressions that are compiled in and chosen by a name (`tokenizer.ggml.pre`). Which of
them a model needs is found out by encoding: the first candidate whose expressions give the ids of tokenizer.json on
the probes is taken, and none is guessed.

Source of the names and expressions: llama.cpp's `src/llama-vocab.cpp` (b11434), read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.inside import is_carried, require_inside
from moepress.runs.files import read_text

FILE = "tokenizer.json"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""tokenizer.ggml.token_type."""
_SPACE = "\u2581"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_WORDS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str) -> str:
    return rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"


def _o200k(digits: str, suffix: str) -> str:
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{_UPPER}*{_LOWER}+{suffix}|{word}{_UPPER}+{_LOWER}*{suffix}|{digits}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
    )


_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}"
)


_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_cl100k(r"\p{N}{1,3}"),),
    "qwen2": (_cl100k(r"\p{N}"),),
    "qwen35": (
        rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _DEEPSEEK_WORDS,
    ),
    "deepseek-llm": (
        r"[\r\n]",
        _DEEPSEEK_LETTERS,
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "gpt-4o": (_o200k(r"\p{N}{1,3}", r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"),),
    "tekken": (_o200k(r"\p{N}", ""),),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
}
"""llama.cpp's names, and the expressions that it splits by, one after the other; what none matches stays whole."""

PROBES = (
    "In 1234567 years: 20,000 leagues, 3.14159 and 0x7fff.",
    "\n\n\tdef f(x):\n        return  x**2  # don't, we'll, I'M they'RE\n\r\n ",
    "Straße, naïve, cafe\u0301, 中文字符, ひらがな, العربية, हिन्दी, 🙂👩\u200d💻, \u00a0\u2028 end",
    "  two  spaces   three\t\ttabs http://a.b/c?d=e_f-G;H!!  \n  \n x\ty",
    "CamelCaseWords and ALLCAPS mIxEd; (a+b)*c == {d[e]}/'f' \"g\"...—…\n",
    "Der Hund läuft über 12 Brücken, während 3½ Äpfel für 99,95 € gekauft werden.\r\nÉté à Nîmes, œuvre.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a file says of its tokenizer.

    Attributes:
        model: `tokenizer.ggml.model`: gpt2 (bytes, then merges) or llama (SentencePiece).
        pre: `tokenizer.ggml.pre`; empty for llama.
        tokens: by id, as many as the model has rows of embeddings.
        types: of them.
        merges: "a b", or none.
        scores: of a SentencePiece model; empty otherwise.
        keys: all other keys, without `tokenizer.`.
        notes: what a user should know.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    keys: Mapping[str, int | bool | str]
    notes: tuple[str, ...] = ()


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """A folder's tokenizer.

    Args:
        folder: with tokenizer.json.
        rows: of the model's embeddings.

    Raises:
        InvalidInputError: there is no tokenizer.json, or it is broken, or has more tokens than the model.
        UnsupportedError: llama.cpp has no such tokenizer.
    """
    from tokenizers import Tokenizer

    raw = _json(folder, FILE)
    if raw is None:
        raise InvalidInputError(f"{folder} has no {FILE}, of which GGUF's vocabulary is made; put it into the folder.")
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
        model = raw["model"]
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in raw.get("added_tokens", ())}
    except Exception as error:  # a bare Exception of Rust
        raise InvalidInputError(f"{folder / FILE} is no tokenizer that can be read; download it again.") from error
    if model.get("type") != "BPE":
        raise UnsupportedError(f"A tokenizer of type {model.get('type')!r} can not be exported to GGUF; BPE ones can.")
    if ids and max(ids.values()) >= rows:
        raise InvalidInputError(f"{folder / FILE} has the id {max(ids.values())}, and the model {rows} rows.")
    tokens, types = _listed(raw, ids, rows)
    keys, settings = _special(folder, tokenizer, ids), _json(folder, "tokenizer_config.json") or {}
    keys |= _template(folder, settings)
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ()))
    if model.get("byte_fallback"):
        scores = _scores(merges, tokens)
        _require_same_pieces(tokenizer, ids, scores)
        kinds = tuple(BYTE if _is_byte(t) else kind for t, kind in zip(tokens, types, strict=True))
        return Vocabulary(model="llama", pre="default", tokens=tokens, types=kinds, scores=scores, keys=keys)
    if not merges:
        raise UnsupportedError(f"{folder / FILE} has no merges, and llama.cpp takes no such vocabulary.")
    pre, notes = _proved(tokenizer)
    if raw.get("normalizer") is not None:
        notes = (
            *notes,
            "llama.cpp does not normalise text before it is split; for most text that makes no difference.",
        )
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, types=types, merges=merges, keys=keys, notes=notes)


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / name
    if not file.is_file():
        return None
    require_inside(folder, file)
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise InvalidInputError(f"{file} is no JSON; download it again.") from error
    return found if isinstance(found, dict) else None


def _listed(raw: Mapping[str, Any], ids: Mapping[str, int], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and types by id; ids without a token are of no use, and are called so."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in ids.items():
        tokens[number], types[number] = token, NORMAL
    for added in raw.get("added_tokens", ()):
        types[added["id"]] = CONTROL if added.get("special") else USER
    unknown = raw["model"].get("unk_token")
    if unknown in ids and raw["model"].get("byte_fallback"):
        types[ids[unknown]] = UNKNOWN
    return tuple(tokens), tuple(types)


def _special(folder: Path, tokenizer: Any, ids: Mapping[str, int]) -> dict[str, int | bool | str]:
    """Ids of the tokens that mean something, and whether a text begins or ends with one."""
    settings, config = _json(folder, "tokenizer_config.json") or {}, _json(folder, "config.json") or {}
    more = _json(folder, "generation_config.json") or {}
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    keys: dict[str, int | bool | str] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        number: Any = ids.get(named) if isinstance(named, str) else None
        for place in (more, text or {}):
            if number is None:
                stated = place.get(f"{role}_token_id")
                number = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 31:
            keys[f"ggml.{key}_token_id"] = number
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a", add_special_tokens=True).ids
    before = len(dressed) > len(alone) and dressed[0] == keys.get("ggml.bos_token_id") != alone[0]
    keys["ggml.add_bos_token"] = bool(before)
    keys["ggml.add_eos_token"] = bool(
        len(dressed) > len(alone) + before and dressed[-1] == keys.get("ggml.eos_token_id")
    )
    return keys


def _template(folder: Path, settings: Mapping[str, Any]) -> dict[str, int | bool | str]:
    file = folder / "chat_template.jinja"
    if file.is_file() and is_carried(file.name):
        require_inside(folder, file)
        return {"chat_template": read_text(file)}
    stated = settings.get("chat_template")
    if isinstance(stated, list):  # several by name
        stated = next((t.get("template") for t in stated if isinstance(t, dict) and t.get("name") == "default"), None)
    return {"chat_template": stated} if isinstance(stated, str) else {}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(merges: tuple[str, ...], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """Scores by which llama.cpp merges in the order of the merges: the earliest that makes a token has the highest."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        order.setdefault(left + right, rank)
    return tuple(-float(order.get(token, len(merges))) for token in tokens)


def _require_same_pieces(tokenizer: Any, ids: Mapping[str, int], scores: tuple[float, ...]) -> None:
    """Hold what llama.cpp does with scores against the tokenizer, on the probes.

    Raises:
        UnsupportedError: the ids differ.
    """
    for text in PROBES:
        if _by_scores(text, ids, scores) != tokenizer.encode(text, add_special_tokens=False).ids:
            raise UnsupportedError(
                f"llama.cpp would split text otherwise than this {FILE} (SentencePiece without its scores), and a "
                "wrong tokenizer makes a model worse without an error; export to another format."
            )


def _by_scores(text: str, ids: Mapping[str, int], scores: tuple[float, ...]) -> list[int]:
    """llama.cpp's SentencePiece: again and again the pair whose token has the highest score, the first of equals."""
    pieces = list(_SPACE + text.replace(" ", _SPACE))
    while True:
        best, place = -float("inf"), -1
        for number in range(len(pieces) - 1):
            found = ids.get(pieces[number] + pieces[number + 1])
            if found is not None and scores[found] > best:
                best, place = scores[found], number
        if place < 0:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    known = ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in pieces)
    return [number for numbers in known for number in numbers]


def _proved(tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    """The first pre-tokenizer of llama.cpp that gives the ids of the tokenizer's own.

    Raises:
        UnsupportedError: none does.
    """
    from tokenizers import Tokenizer

    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    closest, fewest = "", 1 << 30
    for name, expressions in PRE_TOKENIZERS.items():
        other = Tokenizer.from_str(tokenizer.to_str())
        other.pre_tokenizer = splitting(expressions)
        found = [other.encode(text, add_special_tokens=False).ids for text in PROBES]
        wrong = sum(a != b for a, b in zip(wanted, found, strict=True))
        if not wrong:
            stated = _stated(tokenizer)
            known = any(expression in stated for expression in expressions)
            note = f"The tokenizer's own splitting is not known to llama.cpp; its {name!r} gave the same ids."
            return name, () if known else (note,)
        closest, fewest = (name, wrong) if wrong < fewest else (closest, fewest)
    raise UnsupportedError(
        f"None of llama.cpp's pre-tokenizers that moepress knows splits text as this {FILE} does (the closest, "
        f"{closest!r}, gives other ids for {fewest} of {len(PROBES)} probes), and a wrong one makes a model worse "
        "without an error; export to another format."
    )


def splitting(expressions: tuple[str, ...]) -> Any:
    """A pre-tokenizer that splits by expressions, one after the other, and then into bytes."""
    from tokenizers import Regex, pre_tokenizers

    parts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _stated(tokenizer: Any) -> str:
    return "\n".join(_patterns(json.loads(tokenizer.to_str()).get("pre_tokenizer")))


def _patterns(part: Any) -> Iterator[str]:
    """All regular expressions in a pre-tokenizer."""
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        for value in part.values():
            yield from _patterns(value)
    elif isinstance(part, list):
        for value in part:
            yield from _patterns(value)
