"""Timing models of any runtime side by side: samples in turn, their summary, and the ratio of two models."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from moepress.runs.progress import track
from moepress.validation.quality.results import Estimate

PROMPT, DECODE, REPETITIONS = 512, 128, 5

Samples = dict[str, list[float]]  # test to tokens per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is run, and on what.

    Attributes:
        device: where transformers runs.
        dtype: of its weights.
        prompt: tokens of the prefill, if the context has room.
        decode: tokens decoded.
        repetitions: samples after one warm-up.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX Runtime.
    """

    device: torch.device
    dtype: torch.dtype
    prompt: int = PROMPT
    decode: int = DECODE
    repetitions: int = REPETITIONS
    onnx_device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory.

    Attributes:
        provider: what it really runs on.
        tests: by name, the number of tokens and what to run; a run ends when its result is there.
        notes: what the reader of the numbers should know.
    """

    provider: str
    tests: Mapping[str, tuple[int, Callable[[], None]]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model in one runtime, not loaded yet.

    Attributes:
        subject: label of the model.
        runtime: name and version.
        provider: what it is meant to run on.
        dtype: of activations.
        memory: name of the memory it goes to, and bytes needed there.
        load: loads it; may fail in any way.
        obstacle: why it is not even tried.
    """

    subject: str
    runtime: str
    provider: str
    dtype: str
    memory: tuple[str, int]
    load: Callable[[], Loaded]
    obstacle: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What came of a candidate: samples of a model that ran, or the reason why there are none."""

    candidate: Candidate
    provider: str
    samples: Samples
    notes: tuple[str, ...] = ()
    reason: str | None = None


def time_group(group: Sequence[Candidate], repetitions: int) -> list[Timed]:
    """Load all, then take their samples in turn (A B A B ...), so that a slow moment of the machine hits all alike.

    A candidate that can not be loaded or run has a reason instead of samples; the others go on.
    """
    loaded: dict[int, Loaded] = {}
    reasons: dict[int, str] = {}
    for place, candidate in enumerate(group):
        try:
            loaded[place] = candidate.load()
        except Exception as error:  # runtimes refuse models with exception types of their own
            reasons[place] = f"{_name(candidate)} can not load it ({first_line(error)})"
    samples: dict[int, Samples] = {place: {} for place in loaded}
    with track("throughput", (repetitions + 1) * sum(len(m.tests) for m in loaded.values()), unit="tests") as advance:
        for repetition in range(repetitions + 1):
            for place, model in loaded.items():
                for test, (tokens, run) in model.tests.items():
                    if place in reasons:
                        continue
                    try:
                        seconds = _seconds(run)
                    except Exception as error:  # a kernel that is missing, memory: the report must not be lost
                        reasons[place] = f"it can not run here ({first_line(error)})"
                        continue
                    if repetition:  # the first one is the warm-up
                        samples[place].setdefault(test, []).append(tokens / seconds)
                    advance(1)
    return [_timed(group[p], loaded.get(p), samples.get(p, {}), reasons.get(p)) for p in range(len(group))]


def _timed(candidate: Candidate, loaded: Loaded | None, samples: Samples, reason: str | None) -> Timed:
    if loaded is None or reason is not None:
        return Timed(candidate=candidate, provider=candidate.provider, samples={}, reason=reason)
    return Timed(candidate=candidate, provider=loaded.provider, samples=samples, notes=loaded.notes)


def _name(candidate: Candidate) -> str:
    return candidate.runtime.rpartition(" ")[0]


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def summarize(samples: Sequence[float]) -> Estimate:
    """Mean and sample standard deviation, as llama-bench prints them."""
    return Estimate(value=fmean(samples), error=stdev(samples) if len(samples) > 1 else None)


def paired_ratio(samples: Sequence[float], before: Sequence[float]) -> Estimate:
    """Geometric mean of the ratios of samples taken side by side, with its standard error.

    The logarithm makes noise fall alike on both sides: the ratio of B to A is one over that of A to B.
    """
    logs = [math.log(a / b) for a, b in zip(samples, before, strict=True)]
    ratio = math.exp(fmean(logs))
    return Estimate(value=ratio, error=ratio * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None)


def lengths(context: int, prompt: int, decode: int) -> tuple[int, int]:
    """Tokens of prefill and decode that a context has room for: (min(prompt, context - decode), decode).

    In a context not longer than twice `decode`, each gets half of it.
    """
    decode = min(decode, max(1, context // 2))
    return min(prompt, max(1, context - decode)), decode


def random_prompt(vocabulary: int, tokens: int) -> Tensor:
    """The same random tokens for every model with that vocabulary, int64 [1, T] on the CPU."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
