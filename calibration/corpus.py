"""Text in, token windows out: what profile and quantize run over, and what validate measures on.

Shapes: N windows, T tokens in a window, D domains.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moepress.calibration.sources import Document, Source, Tokenizer, read_documents, source_files
from moepress.errors import InvalidInputError, UsageError

CANDIDATE_FACTOR = 8  # windows are chosen among about this many times the tokens that a domain has to give
ROOM_BYTES = 4  # text read for each token wanted, about what a token covers
CUT_MARGIN = 64  # tokens before a cut in the text that the cut may have changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Windows of tokens, all of one length, without padding.

    Attributes:
        windows: int64 [N, T], token ids.
        domain_index: int64 [N], for each window its place in `domains`.
        domains: The D names.
        digest: SHA-256 (hex) of the windows, their domains and the names.
        embedded: Whether any of the text is the default text that comes with moepress.
        bos_policy: What special tokens a document has, in words.
        documents: For each domain, how many documents were read (more than the windows may show).
        tokens_per_domain: For each domain, how many of the N * T tokens are its own.
        notes: What a user should know: a domain with less text than its share, and the like.
    """

    windows: torch.Tensor
    domain_index: torch.Tensor
    domains: tuple[str, ...]
    digest: str
    embedded: bool
    bos_policy: str
    documents: tuple[int, ...]
    tokens_per_domain: tuple[int, ...]
    notes: tuple[str, ...]

    def require_vocabulary(self, vocab_size: int | None) -> None:
        """Raises InvalidInputError if a token id is outside a model's vocabulary; None: nothing is known, no check."""
        highest = int(self.windows.max())
        if vocab_size is not None and highest >= vocab_size:
            raise InvalidInputError(
                f"the tokenizer gives token id {highest}, but the model's vocabulary has {vocab_size} entries: this "
                f"tokenizer and this model do not belong together; check the tokenizer files in the model's folder."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCorpus(Corpus):
    """Windows of the GPTQ papers' convention, domain after domain, with the bytes of text that they score.

    Attributes:
        window_bytes: int64 [N], UTF-8 bytes covered by the T - 1 predicted tokens of each window.
        bytes_exact: Whether the bytes are from offsets in the text; otherwise from decoding the window's tokens.
    """

    window_bytes: torch.Tensor
    bytes_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _EvaluationPart:
    """One domain of an EvaluationCorpus."""

    windows: torch.Tensor
    window_bytes: torch.Tensor
    documents: int
    any_rendered: bool


@dataclass(slots=True, kw_only=True)
class _Pool:
    """What was read of one domain: tokens packed end to end."""

    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    documents: int = 0
    any_rendered: bool = False


def build_corpus(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    window: int,
    seed: int,
    vocab_size: int | None = None,
) -> Corpus:
    """Chooses windows of packed documents, in equal parts from each domain, by a seeded generator.

    Each document is tokenized as the tokenizer does by default (a conversation written by a chat template carries its
    own special tokens and gets no others); documents are packed end to end and cut into windows. Text is read until
    about 8 times a domain's part is there; of several files of a domain the seed says which come first. What a domain
    can not give is given by the others, and noted. The order of the windows spreads each domain evenly.

    Args:
        sources: From `parse_sources` or `embedded_sources`.
        tokenizer: A transformers tokenizer.
        tokens: Tokens wanted in all; whole windows only, so up to `window - 1` fewer.
        window: T, tokens in each window.
        seed: The same seed, text and tokenizer give the same corpus.
        vocab_size: The model's, to check that its tokenizer is the right one.

    Raises:
        UsageError: `tokens` is less than one window for each domain.
        InvalidInputError: A domain has less text than one window, a source can not be read, or an id is too high.
    """
    groups = _by_domain(sources)
    total = _total_windows(tokens, window, tuple(groups))
    room_tokens = (
        max(CANDIDATE_FACTOR * -(-total // len(groups)), 2 * total) * window
    )  # one domain may have to give all
    pools = {domain: _read_pool(group, tokenizer, room_tokens, seed) for domain, group in groups.items()}
    for domain, pool in pools.items():
        _require_window(domain, len(pool.tokens), window)
    available = [len(pool.tokens) // window for pool in pools.values()]
    counts = _shares(available, total)
    windows, domain_index = _choose(pools, counts, window, seed)
    corpus = Corpus(
        windows=windows,
        domain_index=domain_index,
        domains=tuple(groups),
        digest=_digest(windows, domain_index, tuple(groups)),
        embedded=any(source.embedded for source in sources),
        bos_policy=_bos_policy(tokenizer, any_rendered=any(pool.any_rendered for pool in pools.values())),
        documents=tuple(pool.documents for pool in pools.values()),
        tokens_per_domain=tuple(count * window for count in counts),
        notes=_shortfall_notes(tuple(groups), available, counts, total, window),
    )
    corpus.require_vocabulary(vocab_size)
    return corpus


def evaluation_windows(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    window: int,
    max_windows: int | None = None,
    vocab_size: int | None = None,
) -> EvaluationCorpus:
    r"""Cuts each domain's text into windows by the convention of the GPTQ papers.

    All documents of a domain, empty ones too, are joined with "\n\n" and tokenized in one call; windows do not overlap
    and the tail is dropped. A window's bytes lie between the end of its first token and the end of its last, where a
    character that several tokens share belongs to the first of them.

    Args:
        sources: Those of one domain are joined in the order given.
        tokenizer: A transformers tokenizer; without offsets (a slow one) bytes are those of decoded tokens, and noted.
        window: T, tokens in each window.
        max_windows: Windows of each domain, from the start of its text; of a long text only the beginning is read.
        vocab_size: The model's, to check that its tokenizer is the right one.

    Raises:
        UsageError: `window` is less than 2, or `max_windows` less than 1.
        InvalidInputError: A domain has less text than one window, a source can not be read, or an id is too high.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise UsageError("evaluation needs windows of at least 2 tokens, and at least one window.")
    groups = _by_domain(sources)
    parts = [_evaluation_part(domain, group, tokenizer, window, max_windows) for domain, group in groups.items()]
    windows = torch.cat([part.windows for part in parts])
    domain_index = torch.repeat_interleave(torch.tensor([len(part.windows) for part in parts]))
    corpus = EvaluationCorpus(
        windows=windows,
        domain_index=domain_index,
        domains=tuple(groups),
        digest=_digest(windows, domain_index, tuple(groups)),
        embedded=any(source.embedded for source in sources),
        bos_policy=_bos_policy(tokenizer, any_rendered=any(part.any_rendered for part in parts)),
        documents=tuple(part.documents for part in parts),
        tokens_per_domain=tuple(part.windows.numel() for part in parts),
        notes=() if tokenizer.is_fast else ("bytes are counted on decoded tokens: this tokenizer gives no offsets",),
        window_bytes=torch.cat([part.window_bytes for part in parts]),
        bytes_exact=tokenizer.is_fast,
    )
    corpus.require_vocabulary(vocab_size)
    return corpus


def _by_domain(sources: Sequence[Source]) -> dict[str, list[Source]]:
    if not sources:
        raise InvalidInputError("no text was given: name a file, a folder or a dataset, or use the embedded text.")
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.domain, []).append(source)
    return groups


def _total_windows(tokens: int, window: int, domains: Sequence[str]) -> int:
    """Whole windows in the budget."""
    total = tokens // window if window > 0 else 0
    if total < len(domains):
        raise UsageError(
            f"{tokens} tokens are less than one window of {window} for each of the {len(domains)} domains "
            f"({', '.join(domains)}); ask for at least {len(domains) * max(window, 1)} tokens, or a shorter window."
        )
    return total


def _require_window(domain: str, tokens: int, window: int) -> None:
    if tokens < window:
        raise InvalidInputError(
            f"domain {domain!r} has {tokens} tokens of text, less than one window of {window}; "
            f"give it more text, leave it out, or choose a shorter window."
        )


def _paths(group: Sequence[Source]) -> list[tuple[Path, bool]]:
    return [(path, source.embedded) for source in group for path in source_files(source)]


def _token_ids(tokenizer: Tokenizer, text: str, *, rendered: bool = False) -> list[int]:
    """The ids of one document; `verbose=False`: one that is longer than the model's context is no mistake here."""
    ids: list[int] = tokenizer(text, add_special_tokens=not rendered, verbose=False)["input_ids"]
    return ids


def _read_pool(group: Sequence[Source], tokenizer: Tokenizer, room_tokens: int, seed: int) -> _Pool:
    """Reads documents of one domain until about `room_tokens` are there, its files in an order that the seed gives."""
    paths = _paths(group)
    random.Random(f"files:{seed}:{group[0].domain}").shuffle(paths)
    pool = _Pool()
    for path, embedded in paths:
        limit_bytes = ROOM_BYTES * room_tokens
        for document in read_documents(path, tokenizer, embedded=embedded, limit_bytes=limit_bytes):
            if document.text.strip():
                pool.tokens.extend(_token_ids(tokenizer, document.text, rendered=document.rendered))
                pool.documents += 1
                pool.any_rendered |= document.rendered
            if len(pool.tokens) >= room_tokens:
                return pool
    return pool


def _shares(available: Sequence[int], total: int) -> list[int]:
    """Deals `total` windows out in equal parts; what one domain lacks is dealt to the others that have more."""
    counts = [0] * len(available)
    left = min(total, sum(available))
    while left:
        open_domains = [d for d, count in enumerate(counts) if count < available[d]]
        part, rest = divmod(left, len(open_domains))
        for place, d in enumerate(open_domains):
            given = min(part + (place < rest), available[d] - counts[d])
            counts[d] += given
            left -= given
    return counts


def _choose(
    pools: dict[str, _Pool], counts: Sequence[int], window: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws windows of each domain's end-to-end cut without repeats: int64 [N, T], and their domains, int64 [N]."""
    chosen = []
    for (domain, pool), count in zip(pools.items(), counts, strict=True):
        cut = torch.frombuffer(pool.tokens, dtype=torch.int64)[: len(pool.tokens) // window * window].view(-1, window)
        drawn = random.Random(f"windows:{seed}:{domain}").sample(range(len(cut)), count)
        chosen.append(cut[torch.tensor(drawn)])
    places = sorted(((k + 0.5) / count, d, k) for d, count in enumerate(counts) for k in range(count))
    windows = torch.stack([chosen[d][k] for _, d, k in places])
    return windows, torch.tensor([d for _, d, _ in places], dtype=torch.int64)


def _shortfall_notes(
    domains: Sequence[str], available: Sequence[int], counts: Sequence[int], total: int, window: int
) -> tuple[str, ...]:
    """One sentence for each domain with less than its equal part, and one if the whole is short."""
    share = total // len(domains)
    short = [(domain, count) for domain, have, count in zip(domains, available, counts, strict=True) if have < share]
    notes = [f"domain {name} has text for {count} of the {share} windows of its equal part" for name, count in short]
    if sum(counts) < total:
        notes.append(f"the text gives {sum(counts) * window} of the {total * window} tokens asked for")
    return tuple(notes)


def _bos_policy(tokenizer: Tokenizer, *, any_rendered: bool) -> str:
    """What the tokenizer adds to a document, found by asking it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    before, after = full[:1] != plain[:1], full[-1:] != plain[-1:]
    added = " and ".join(name for name, is_added in (("BOS", before), ("EOS", after)) if is_added)
    policy = f"tokenizer default: adds {added}" if added else "none"
    return f"{policy}; conversations: as the chat template writes them" if any_rendered else policy


def _digest(windows: torch.Tensor, domain_index: torch.Tensor, domains: tuple[str, ...]) -> str:
    header = json.dumps({"shape": list(windows.shape), "domains": domains}).encode()
    parts = [part.contiguous().numpy().astype("<i8").tobytes() for part in (windows, domain_index)]
    return hashlib.sha256(b"\0".join([header, *parts])).hexdigest()


def _evaluation_part(
    domain: str, group: Sequence[Source], tokenizer: Tokenizer, window: int, max_windows: int | None
) -> _EvaluationPart:
    """The windows of one domain, and their bytes."""
    ids, ends, read = _tokenize_joined(group, tokenizer, None if max_windows is None else max_windows * window)
    _require_window(domain, len(ids), window)
    count = min(len(ids) // window, max_windows or len(ids))
    windows = torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
    return _EvaluationPart(
        windows=windows,
        window_bytes=_window_bytes(windows, ends, tokenizer),
        documents=len(read),
        any_rendered=any(document.rendered for document in read),
    )


def _tokenize_joined(
    group: Sequence[Source], tokenizer: Tokenizer, wanted: int | None
) -> tuple[list[int], np.ndarray | None, list[Document]]:
    """One domain's text in one call: its ids, the byte where each token ends (None: no offsets), its documents."""
    limit_bytes = None if wanted is None else ROOM_BYTES * (2 * wanted + CUT_MARGIN)
    while True:
        documents, was_cut = _read_joined(group, tokenizer, limit_bytes)
        text = "\n\n".join(document.text for document in documents)
        special = not any(document.rendered for document in documents)
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if wanted is None or limit_bytes is None or not was_cut or len(ids) >= wanted + CUT_MARGIN:
            break
        limit_bytes *= 4  # tokens here cover more text than usual
    return ids, _end_bytes(text, encoded["offset_mapping"]) if tokenizer.is_fast else None, documents


def _read_joined(group: Sequence[Source], tokenizer: Tokenizer, limit_bytes: int | None) -> tuple[list[Document], bool]:
    """The documents of one domain, and whether the limit left some text unread."""
    documents: list[Document] = []
    room = limit_bytes
    for document in _documents(group, tokenizer, limit_bytes):
        documents.append(document)
        if room is not None:
            room -= len(document.text.encode()) + len("\n\n")
            if room < CUT_MARGIN:  # not 0: a limit inside a character gives a few bytes less
                return documents, True
    return documents, False


def _documents(group: Sequence[Source], tokenizer: Tokenizer, limit_bytes: int | None) -> Iterator[Document]:
    for path, embedded in _paths(group):
        yield from read_documents(path, tokenizer, embedded=embedded, limit_bytes=limit_bytes)


def _end_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 [tokens]: the UTF-8 byte of the text where each token ends; special tokens end where the last one did."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    byte_at = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    return byte_at[np.maximum.accumulate(ends)]


def _window_bytes(windows: torch.Tensor, ends: np.ndarray | None, tokenizer: Tokenizer) -> torch.Tensor:
    """int64 [N]: UTF-8 bytes from the end of each window's first token to the end of its last; windows int64 [N, T]."""
    count, window = windows.shape
    if ends is not None:
        cut = torch.from_numpy(ends[: count * window].copy()).view(count, window)
        return cut[:, -1] - cut[:, 0]
    texts = [(tokenizer.decode(row), tokenizer.decode(row[:1])) for row in windows.tolist()]
    return torch.tensor([len(whole.encode()) - len(first.encode()) for whole, first in texts], dtype=torch.int64)
