"""What measuring gives: plain rows, without torch, that the report takes over as they are.

A `subject` is a model by its label; the first one is the reference. Errors are one standard error (sigma).
"""

from dataclasses import dataclass, field
from typing import Literal

ALL_WINDOWS = "all windows"
DOMAIN_MEAN = "mean over domains"

Scope = Literal["domain", "all", "domain-mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measured number and its standard error; None where there are too few samples to know it."""

    value: float
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """How KL(reference || subject), nats, is spread over positions: a mean hides the few where a model goes astray.

    Attributes:
        median, p90, p99, p999: so much or less has a half of the positions, 90 %, 99 %, 99.9 %; errors by resampling
            windows.
        largest: the most that any position has.
    """

    median: Estimate
    p90: Estimate
    p99: Estimate
    p999: Estimate
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A subject against the reference on the same tokens.

    Attributes:
        delta_nll: NLL of the subject minus that of the reference, nats per token; error over windows.
        perplexity_ratio: exp(delta_nll): 1.02 is 2 % more perplexity than the reference has.
        kl: mean KL(reference || subject) over positions, nats per token; error over windows.
        same_top1: share of positions where both predict the same token; error is the binomial sigma.
        same_top5: share of the reference's five likeliest tokens that are among the subject's; error over windows.
        reverse_kl: mean KL(subject || reference), nats per token, which counts what only the subject thinks likely.
        rms_delta_p: root of the mean squared difference of the probabilities of the token that follows in the text.
        tail: how `kl` is spread over positions.

    The last four are None in reports that were made before there were any.
    """

    delta_nll: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    same_top1: Estimate
    same_top5: Estimate | None = None
    reverse_kl: Estimate | None = None
    rms_delta_p: Estimate | None = None
    tail: Tail | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One subject on one domain, on all windows, or averaged over domains with equal weights.

    Attributes:
        subject: its label.
        domain: name of the domain, `ALL_WINDOWS` or `DOMAIN_MEAN`.
        scope: which of the three it is.
        windows: how many windows.
        tokens: predicted tokens, one less than the window's length for each window.
        nll: mean of the window means, nats per token.
        perplexity: exp(nll); with `domain-mean` the geometric mean of the domains' perplexities.
        bits_per_byte: information per UTF-8 byte of text, comparable between tokenizers; None where bytes are unknown.
        paired: against the reference; None for the reference itself.
    """

    subject: str
    domain: str
    scope: Scope
    windows: int
    tokens: int
    nll: Estimate
    perplexity: Estimate
    bits_per_byte: float | None
    paired: Paired | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRow:
    """How often the routers of one subject choose other experts than the reference's, in one layer or in all.

    Attributes:
        subject: its label.
        layer: number of the layer; None: all layers with experts together.
        tokens: how many chose in each layer, all tokens of all windows.
        changed: share (0 to 1) of tokens for which the subject does not choose every expert that the reference chose
            and that the subject has; over all layers their mean. Error over windows.
        common: share (0 to 1) of the reference's choices of experts that the subject has which it makes too; None
            where there are none.
    """

    subject: str
    layer: int | None
    tokens: int
    changed: Estimate
    common: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A reference that was not run: what was kept of its predictions.

    KL divergences of others against it are lower bounds, for all tokens that were not kept count as one.

    Attributes:
        file: name of the file.
        model: name of the model's folder, or owner/name@commit of the hub; None where it had none.
        sha256: of the file.
        tool_version, created: what made the file, and when.
        top: tokens that are kept of each position.
        rest: mean probability (0 to 1) of those that are not.
    """

    file: str
    model: str | None
    sha256: str
    tool_version: str
    created: str
    top: int
    rest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """All quality rows, and everything one has to know to compare them with other people's.

    Attributes:
        convention: how text became windows, in words.
        window: tokens in a window, the context of the measurement.
        windows: how many.
        tokens: predicted tokens in all.
        bos_policy: what special tokens there are, in words.
        digest: SHA-256 of the windows.
        embedded: whether any of the text is the default text that comes with moepress.
        bytes_exact: whether bytes come from offsets in the text (else from decoded tokens).
        vocabulary: entries in the subjects' vocabulary.
        device: where it was computed, but for ONNX subjects.
        dtype: compute dtype, but for ONNX subjects.
        domains: names in order.
        rows: subject by subject; in each the domains, then `ALL_WINDOWS`, then `DOMAIN_MEAN` if there are several.
        notes: of the corpus and the subjects.
        runtimes: what computed each subject, by its label.
        routing: of the subjects whose routers could be compared with the reference's, layer by layer, then over all
            layers; another runtime shows no routers, and of some pruned models nobody knows which experts they have.
        saved: what the first subject is known by, where it was not run; None where it was.
    """

    convention: str
    window: int
    windows: int
    tokens: int
    bos_policy: str
    digest: str
    embedded: bool
    bytes_exact: bool
    vocabulary: int
    device: str
    dtype: str
    domains: tuple[str, ...]
    rows: tuple[QualityRow, ...]
    notes: tuple[str, ...] = ()
    runtimes: dict[str, str] = field(default_factory=dict)
    routing: tuple[RoutingRow, ...] = ()
    saved: Saved | None = None

    def row(self, subject: str, domain: str = ALL_WINDOWS) -> QualityRow:
        """The row of a subject and a domain (or `ALL_WINDOWS`, `DOMAIN_MEAN`); KeyError if there is none."""
        for row in self.rows:
            if (row.subject, row.domain) == (subject, domain):
                return row
        raise KeyError((subject, domain))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRow:
    """Tokens per second of one subject in one of llama-bench's tests.

    Attributes:
        subject: its label.
        runtime: name and version of what ran it.
        provider: what that really ran on: `CPU`, `CUDA` or `MPS`.
        dtype: of activations.
        test: `pp512` is prefill of 512 tokens, `tg128` decode of 128 tokens, both with batch 1.
        tokens_per_second: mean and standard deviation (not standard error, as in llama-bench); None: not measured.
        samples: all of them, tokens per second, without the warm-up.
        ratio: to the first model in the same runtime and provider, over samples of the same repetitions: geometric mean
            and standard error; None for itself.
        note: why it was not measured, or how.
    """

    subject: str
    test: str
    tokens_per_second: Estimate | None
    samples: tuple[float, ...] = ()
    ratio: Estimate | None = None
    note: str | None = None
    runtime: str = ""
    provider: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """All throughput rows with what they were measured on."""

    device: str
    threads: int
    repetitions: int
    rows: tuple[ThroughputRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """How one model goes on from a beginning.

    Attributes:
        subject: its label.
        text: the new text, without special tokens, as the model wrote it.
        tokens: how many they are.
        same_tokens: how many of them, from the first on, are those of the first model.
    """

    subject: str
    text: str
    tokens: int
    same_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One beginning of the evaluation text, and how the models go on from it.

    Attributes:
        domain: where it is from.
        prompt: the beginning.
        continuations: the first model's, then that of the result.
    """

    domain: str
    prompt: str
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Text that the models write: the likeliest token at each step.

    Attributes:
        prompt_tokens: tokens of each beginning.
        tokens: at most so many new ones.
        rows: one for each of the first domains.
    """

    prompt_tokens: int
    tokens: int
    rows: tuple[Sample, ...]
