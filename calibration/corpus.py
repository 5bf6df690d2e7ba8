"""Text in, token windows out: what profile and quantize run over, and what validate measures on.

Shapes: N windows, T tokens in a window, D domains.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moepress.calibration.evaluation import evaluation_part
from moepress.calibration.pools import Pool
from moepress.calibration.sources import Source
from moepress.calibration.templates import ChatTemplate
from moepress.calibration.tokens import TokenFile, Tokenizer
from moepress.errors import InvalidInputError, UsageError

CANDIDATE_FACTOR = 8  # windows are chosen among about this many times the tokens that a domain has to give
NO_OFFSETS_NOTE = "bytes are counted on decoded tokens: this tokenizer gives no offsets"
MAPPED_BYTES = 64 << 20  # windows beyond this are in a file


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
    store = TokenFile()
    with ChatTemplate(tokenizer) as chat:
        pools = {
            domain: Pool(domain, group, tokenizer, chat, store, room_tokens=room_tokens, window=window, seed=seed)
            for domain, group in groups.items()
        }
    notes = [note for pool in pools.values() for note in pool.notes]
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
        notes=(*notes, *_shortfall_notes(tuple(groups), available, counts, total, window)),
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
    with ChatTemplate(tokenizer) as chat:
        parts = [
            evaluation_part(domain, group, tokenizer, chat, window=window, max_windows=max_windows)
            for domain, group in groups.items()
        ]
    for domain, part in zip(groups, parts, strict=True):
        _require_window(domain, part.tokens, window)
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
        notes=(*(() if tokenizer.is_fast else (NO_OFFSETS_NOTE,)), *(note for part in parts for note in part.notes)),
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


def sampled(corpus: Corpus, tokens: int, least: int = 1) -> torch.Tensor:
    """So many tokens, or a little more, in whole windows of a corpus, of each domain its share: int64 [M, T].

    Domains take turns in a corpus, so that every n-th window might be of one domain.

    Args:
        corpus: of at least one window.
        tokens: in all.
        least: windows that are taken where there are so many.
    """
    count = min(len(corpus.windows), max(least, -(-tokens // corpus.windows.shape[1])))
    by_domain = corpus.domain_index.argsort(stable=True)
    return corpus.windows[by_domain[torch.arange(count) * len(by_domain) // count].sort().values]


def _choose(pools: dict[str, Pool], counts: Sequence[int], window: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws windows of each domain's end-to-end cut without repeats: int64 [N, T], and their domains, int64 [N]."""
    chosen = []
    for (domain, pool), count in zip(pools.items(), counts, strict=True):
        cut = pool.tokens[: len(pool.tokens) // window * window].reshape(-1, window)
        chosen.append((cut, random.Random(f"windows:{seed}:{domain}").sample(range(len(cut)), count)))
    places = sorted(((k + 0.5) / count, d, k) for d, count in enumerate(counts) for k in range(count))
    windows = _empty(len(places), window)
    for place, (_, d, k) in enumerate(places):
        cut, drawn = chosen[d]
        windows[place] = cut[drawn[k]]
    return torch.from_numpy(windows), torch.tensor([d for _, d, _ in places], dtype=torch.int64)


def _empty(count: int, window: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Room for windows; mapped from a temporary file where they are many."""
    if count * window * 8 <= MAPPED_BYTES:
        return np.empty((count, window), dtype=np.int64)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.int64, mode="w+", shape=(count, window))


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
    found = hashlib.sha256(header)
    for part in (windows, domain_index):
        found.update(b"\0")
        found.update(part.contiguous().view(-1).numpy().astype("<i8", copy=False).data)
    return found.hexdigest()
