"""Tokens per second as llama-bench measures them: `pp512` (prefill) and `tg128` (decode), batch 1.

Prefill is one forward pass over a prompt of random tokens. Decode starts from an empty cache with one token, takes the
most likely next token 128 times, and never stops at an end-of-text token. ONNX folders run in ONNX Runtime and, where
it is installed, in onnxruntime-genai; GGUF files in llama.cpp; all others in transformers, which computes only the
logits of the prompt's last token.
"""

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.converters.gguf.file import GgufModel
from moepress.converters.mlx.folder import MlxFolder
from moepress.converters.onnx.folder import OnnxFolder
from moepress.errors import InvalidInputError
from moepress.models.forward.dense import free_memory_bytes, release_dense
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.folder import load_config
from moepress.models.storage.packed import Packing
from moepress.runs.store.remote import url_of
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.results import Throughput, ThroughputRow
from moepress.validation.speed.llama_throughput import llama_candidate
from moepress.validation.speed.onnx_throughput import onnx_candidates
from moepress.validation.speed.timing import (
    Bench,
    Candidate,
    Loaded,
    Timed,
    lengths,
    paired_ratio,
    random_prompt,
    summarize,
    time_group,
)

_DENSE_NOTE = "compressed-tensors, made dense when loaded: the speed of this runtime, not of INT4 kernels"
_NOISY_SHARE = 0.1
_NOISY_NOTE = "noisy: the samples spread by more than 10 %, the machine had other work"
_APART_NOTE = "not interleaved: the models do not fit into memory together"


def measure_throughput(subjects: Sequence[Subject], bench: Bench) -> Throughput:
    """Time every subject in every runtime that runs it; rows are grouped by runtime and provider.

    A ratio is to the first model of the same runtime and provider; a model that is alone there is compared with the
    first subject in its own runtime, and the row says so. What can not be measured (too large, no folder, refused by a
    runtime) has a row that says why. If the models do not fit into memory together they are timed one after the other,
    and the rows say so.
    """
    candidates = [candidate for subject in subjects for candidate in _candidates(subject, bench)]
    runnable = [candidate for candidate in candidates if candidate.obstacle is None]
    with _quiet(), torch.inference_mode():
        together = _fit_together(runnable)
        timed: list[Timed] = []
        for group in [runnable] if together else [[candidate] for candidate in runnable]:
            timed += time_group(group, bench.repetitions)
            release_dense(bench.device)
    timed += [Timed(candidate=c, provider=c.provider, samples={}, reason=c.obstacle) for c in candidates if c.obstacle]
    return Throughput(
        device=device_name(bench.device),
        threads=torch.get_num_threads(),
        repetitions=bench.repetitions,
        rows=tuple(_all_rows(_by_runtime(timed, candidates), subjects, [] if together else [_APART_NOTE])),
    )


def _candidates(subject: Subject, bench: Bench) -> list[Candidate]:
    if isinstance(subject.source, OnnxFolder):
        return onnx_candidates(subject.label, subject.source, bench)
    if isinstance(subject.source, GgufModel):
        return [llama_candidate(subject.label, subject.source, bench)]
    return [_in_transformers(subject, bench)]


def _fit_together(candidates: Sequence[Candidate]) -> bool:
    needed: dict[str, int] = {}
    for candidate in candidates:
        place, size = candidate.memory
        needed[place] = needed.get(place, 0) + size
    return all(size <= free_memory_bytes(torch.device(place)) for place, size in needed.items())


def _by_runtime(timed: Sequence[Timed], candidates: Sequence[Candidate]) -> list[Timed]:
    """Runtimes in the order in which they first came, in each the subjects in their order."""
    order = list(dict.fromkeys((c.runtime, c.provider) for c in candidates))
    places = {id(c): (order.index((c.runtime, c.provider)), place) for place, c in enumerate(candidates)}
    return sorted(timed, key=lambda one: places[id(one.candidate)])


def _all_rows(timed: Sequence[Timed], subjects: Sequence[Subject], common: Sequence[str]) -> list[ThroughputRow]:
    rows = []
    ran = [one for one in timed if one.reason is None]
    original = next((one for one in ran if one.candidate.subject == subjects[0].label), None)
    for one in timed:
        if one.reason is not None:
            rows.append(_row(one, "-", None, [f"not measured: {one.reason}"]))
            continue
        here = [o for o in ran if (o.candidate.runtime, o.provider) == (one.candidate.runtime, one.provider)]
        first, notes = None if here[0] is one else here[0], [*one.notes, *common]
        if len(here) == 1 and original is not None and original is not one:
            first = original
            notes.append(f"ratio: to {first.candidate.subject} in {first.candidate.runtime}")
        rows += [_row(one, test, first, notes) for test in one.samples]
    return rows


def _row(one: Timed, test: str, first: Timed | None, notes: Sequence[str]) -> ThroughputRow:
    samples = one.samples.get(test, [])
    before = first.samples.get(test) if first is not None else None
    speed = summarize(samples) if samples else None
    busy = [_NOISY_NOTE] if speed is not None and (speed.error or 0.0) > _NOISY_SHARE * speed.value else []
    return ThroughputRow(
        subject=one.candidate.subject,
        runtime=one.candidate.runtime,
        provider=one.provider,
        dtype=one.candidate.dtype,
        test=test,
        tokens_per_second=speed,
        samples=tuple(samples),
        ratio=None if before is None else paired_ratio(samples, before),
        note="; ".join([*notes, *busy]) or None,
    )


def _in_transformers(subject: Subject, bench: Bench) -> Candidate:
    import transformers

    return Candidate(
        subject=subject.label,
        runtime=f"transformers {transformers.__version__}",
        provider=bench.device.type.upper(),
        dtype=str(bench.dtype).removeprefix("torch."),
        memory=(str(bench.device), _dense_bytes(subject, bench)),
        load=lambda: _prepare(subject, _load(subject, bench), bench),
        obstacle=_obstacle(subject, bench),
    )


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({device.type}, {os.cpu_count()} logical cores)"


def _dense_bytes(subject: Subject, bench: Bench) -> int:
    return subject.parameters * bench.dtype.itemsize


def _obstacle(subject: Subject, bench: Bench) -> str | None:
    """Why a subject can not be measured, or None."""
    if subject.folder is None:
        return "it is not a folder on disk"
    if (url := url_of(subject.folder)) is not None:
        return f"its shards lie in {url}; copy the folder here to time it"
    if isinstance(subject.source, MlxFolder):
        return "MLX folders are not timed"
    if isinstance(subject.source, Checkpoint) and any(
        p.packing is Packing.GGUF for p in subject.source.packed.values()
    ):
        return "transformers does not know GGUF's blocks; export it to GGUF"
    needed, free = _dense_bytes(subject, bench), free_memory_bytes(bench.device)
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
    quantization = load_config(folder).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def _is_compressed(subject: Subject) -> bool:
    return subject.folder is not None and _quantization(subject.folder) == "compressed-tensors"


def _load(subject: Subject, bench: Bench) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if _is_compressed(subject) else {}
    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=bench.dtype, local_files_only=True, **extra)
    for weight in model.parameters():  # transformers leaves dequantized experts in the dtype of their scales
        if weight.dtype in {torch.bfloat16, torch.float16}:
            weight.data = weight.data.to(bench.dtype)
    return model.to(bench.device).eval()


def _prepare(subject: Subject, model: Any, bench: Bench) -> Loaded:
    config = model.config.get_text_config()
    context = int(getattr(config, "max_position_embeddings", 0) or bench.prompt + bench.decode)
    prompt, decode = lengths(context, bench.prompt, bench.decode)
    tokens = random_prompt(int(config.vocab_size), prompt).to(bench.device)
    return Loaded(
        provider=bench.device.type.upper(),
        tests={
            f"pp{prompt}": (prompt, _synchronized(bench.device, lambda: _prefill(model, tokens))),
            f"tg{decode}": (decode, _synchronized(bench.device, lambda: _decode(model, tokens[:, :1], decode))),
        },
        notes=(_DENSE_NOTE,) if _is_compressed(subject) else (),
    )


def _prefill(model: Any, tokens_BT: Tensor) -> None:
    model(tokens_BT, use_cache=True, logits_to_keep=1)


def _decode(model: Any, token_B1: Tensor, steps: int) -> None:
    token, cache = token_B1, None
    for _ in range(steps):
        output = model(token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values


def _synchronized(device: torch.device, run: Callable[[], None]) -> Callable[[], None]:
    """The run with its result waited for; nothing of an earlier one is left when it begins."""

    def synchronized() -> None:
        run()
        _synchronize(device)

    return synchronized


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
