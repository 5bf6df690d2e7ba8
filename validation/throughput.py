"""Tokens per second as llama-bench measures them: `pp512` (prefill) and `tg128` (decode), batch 1.

Prefill is one forward pass over a prompt of random tokens, logits of its last position only. Decode starts from an
empty cache with one token, takes the most likely next token 128 times, and never stops at an end-of-text token. The
models run in transformers; their samples are taken in turn (A B A B ...), so that a slow moment of the machine hits
all alike.
"""

import gc
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import psutil
import torch
from torch import Tensor

from moepress.errors import InvalidInputError
from moepress.models.checkpoint import load_config
from moepress.progress import track
from moepress.validation.measure import Subject
from moepress.validation.results import Estimate, Throughput, ThroughputRow

PROMPT, DECODE, REPETITIONS = 512, 128, 5
_DENSE_NOTE = "compressed-tensors, made dense when loaded: the speed of this runtime, not of INT4 kernels"
_NOISY_SHARE = 0.1
_NOISY_NOTE = "noisy: the samples spread by more than 10 %, the machine had other work"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is run, and on what.

    Attributes:
        device: where the models run.
        dtype: of their weights.
        prompt: tokens of the prefill, if the context has room.
        decode: tokens decoded.
        repetitions: samples after one warm-up.
    """

    device: torch.device
    dtype: torch.dtype
    prompt: int = PROMPT
    decode: int = DECODE
    repetitions: int = REPETITIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A model that can be timed: its tests by name, each with its number of tokens and what to run."""

    subject: Subject
    tests: Mapping[str, tuple[int, Callable[[], None]]]


def measure_throughput(subjects: Sequence[Subject], bench: Bench) -> Throughput:
    """Time every subject; the first one is the reference of the ratios.

    A subject that can not be measured (too large, no folder, refused by transformers) has a row that says why. If the
    models do not fit into memory together they are timed one after the other, and the rows say so.
    """
    rows: list[ThroughputRow] = []
    with _quiet(), torch.inference_mode():
        reasons = {subject.label: _obstacle(subject, bench) for subject in subjects}
        runnable = [subject for subject in subjects if reasons[subject.label] is None]
        together = sum(_dense_bytes(subject, bench) for subject in runnable) <= free_bytes(bench.device)
        groups = [runnable] if together else [[subject] for subject in runnable]
        samples: dict[str, dict[str, list[float]]] = {}
        for group in groups:
            samples |= _time_group(group, bench, reasons)
            _release(bench.device)
    first = samples.get(subjects[0].label, {}) if subjects else {}
    for subject in subjects:
        if subject.label in samples:
            notes = [_DENSE_NOTE] if _is_compressed(subject) else []
            notes += [] if together else ["not interleaved: the models do not fit into memory together"]
            mine = samples[subject.label]
            rows += _rows(subject.label, mine, None if mine is first else first, notes)
        else:
            note = f"not measured: {reasons[subject.label]}"
            rows.append(ThroughputRow(subject=subject.label, test="-", tokens_per_second=None, note=note))
    return Throughput(
        device=device_name(bench.device),
        threads=torch.get_num_threads(),
        dtype=str(bench.dtype).removeprefix("torch."),
        runtime=_runtime(),
        repetitions=bench.repetitions,
        rows=tuple(rows),
    )


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


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({device.type}, {os.cpu_count()} logical cores)"


def _rows(
    label: str,
    mine: Mapping[str, Sequence[float]],
    first: Mapping[str, Sequence[float]] | None,
    notes: Sequence[str],
) -> list[ThroughputRow]:
    rows = []
    for test, samples in mine.items():
        before = first.get(test) if first is not None else None
        speed = summarize(samples)
        busy = [_NOISY_NOTE] if (speed.error or 0.0) > _NOISY_SHARE * speed.value else []
        row = ThroughputRow(
            subject=label,
            test=test,
            tokens_per_second=speed,
            samples=tuple(samples),
            ratio=None if before is None else paired_ratio(samples, before),
            note="; ".join([*notes, *busy]) or None,
        )
        rows.append(row)
    return rows


def _dense_bytes(subject: Subject, bench: Bench) -> int:
    return subject.parameters * bench.dtype.itemsize


def _obstacle(subject: Subject, bench: Bench) -> str | None:
    """Why a subject can not be measured, or None."""
    if subject.folder is None:
        return "it is not a folder on disk"
    needed, free = _dense_bytes(subject, bench), free_bytes(bench.device)
    if needed > free:
        return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    try:
        method = _quantization(subject.folder)
    except InvalidInputError as error:
        return str(error)
    if method == "gptq":  # random experts instead of an error
        return "transformers can not load GPTQ experts"
    return None


def _quantization(folder: Path) -> str | None:
    """The way of quantization that a folder's config names."""
    return (load_config(folder).get("quantization_config") or {}).get("quant_method")


def _is_compressed(subject: Subject) -> bool:
    return subject.folder is not None and _quantization(subject.folder) == "compressed-tensors"


def _time_group(
    group: Sequence[Subject], bench: Bench, reasons: dict[str, str | None]
) -> dict[str, dict[str, list[float]]]:
    """Samples of models that are in memory together: label to test to tokens per second; failures go to `reasons`."""
    loaded = []
    for subject in group:
        try:
            model = _load(subject, bench)
        except Exception as error:  # transformers refuses models with many exception types
            reasons[subject.label] = f"transformers can not load it ({_first_line(error)})"
        else:
            loaded.append(_prepare(subject, model, bench))
    samples: dict[str, dict[str, list[float]]] = {model.subject.label: {} for model in loaded}
    with track("throughput", (bench.repetitions + 1) * sum(len(model.tests) for model in loaded)) as advance:
        for repetition in range(bench.repetitions + 1):
            for model in loaded:
                for test, (tokens, run) in model.tests.items():
                    if reasons.get(model.subject.label):
                        continue
                    try:
                        seconds = _seconds(run, bench.device)
                    except Exception as error:  # a kernel that is missing, memory: the report must not be lost
                        reasons[model.subject.label] = f"it can not run here ({_first_line(error)})"
                        continue
                    if repetition:  # the first one is the warm-up
                        samples[model.subject.label].setdefault(test, []).append(tokens / seconds)
                    advance(1)
    return samples


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _load(subject: Subject, bench: Bench) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if _is_compressed(subject) else {}
    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=bench.dtype, local_files_only=True, **extra)
    for weight in model.parameters():  # transformers leaves dequantized experts in the dtype of their scales
        if weight.dtype in {torch.bfloat16, torch.float16}:
            weight.data = weight.data.to(bench.dtype)
    return model.to(bench.device).eval()


def _prepare(subject: Subject, model: Any, bench: Bench) -> _Loaded:
    context = int(getattr(model.config, "max_position_embeddings", 0) or bench.prompt + bench.decode)
    prompt, decode = lengths(context, bench.prompt, bench.decode)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(model.config.vocab_size), (1, prompt), generator=generator).to(bench.device)
    return _Loaded(
        subject=subject,
        tests={
            f"pp{prompt}": (prompt, lambda: _prefill(model, tokens)),
            f"tg{decode}": (decode, lambda: _decode(model, tokens[:, :1], decode)),
        },
    )


def _prefill(model: Any, tokens_BT: Tensor) -> None:
    model(tokens_BT, use_cache=True, logits_to_keep=1)


def _decode(model: Any, token_B1: Tensor, steps: int) -> None:
    token, cache = token_B1, None
    for _ in range(steps):
        output = model(token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _runtime() -> str:
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal, and put its settings back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
