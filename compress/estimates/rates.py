"""How fast this machine is at what moepress does: a second of measuring, so that times can be projected."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from moepress.compress.gptq import native
from moepress.compress.gptq.grid import search_scales_on
from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.fp8 import dequantize_blocks

ASSUMED_READ = 500e6
"""Bytes per second of a disk that could not be measured: a SATA SSD."""
_BUSY_SHARE = 0.25  # of the cores
_SAMPLE_BYTES, _LEAST_SAMPLE_BYTES, _SAMPLE_SECONDS = 256 << 20, 64 << 20, 0.5
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was measured.

    Attributes:
        device: where layers run and matrices are solved.
        forward_flops: matmul rate in the compute dtype, FLOP per second.
        solver_flops: matmul rate in fp32.
        search_seconds: of the scale search, per weight: the solver's work that no matmul does.
        load_seconds: per weight, to turn what is stored into fp32 and to look for NaN, on the CPU.
        read_bytes_per_second: of the model's own shards, past the system's cache.
        read_measured: False where that is `ASSUMED_READ`.
        native: whether the solver's inner loops are native ones, on the CPU.
        others_share: of the cores, what other processes took while all this was measured.
    """

    device: str
    forward_flops: float
    solver_flops: float
    search_seconds: float
    load_seconds: float
    read_bytes_per_second: float
    read_measured: bool
    native: bool = False
    others_share: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other processes took so much that these rates are too low."""
        return self.others_share > _BUSY_SHARE


def measure_rates(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure this machine; takes about a second, and reads up to 256 MiB of the model."""
    solver = torch.device("cpu") if device.type == "mps" else device
    read = read_rate({entry.file for entry in checkpoint.stored.values()})
    before = _busy_seconds()
    with torch.inference_mode():
        rates = Rates(
            device=str(device),
            forward_flops=matmul_rate(device, dtype),
            solver_flops=matmul_rate(solver, torch.float32),
            search_seconds=_search_seconds(solver),
            load_seconds=_load_seconds(fp8=checkpoint.block is not None),
            read_bytes_per_second=read or ASSUMED_READ,
            read_measured=read is not None,
            native=native.library() is not None,
        )
    return replace(rates, others_share=_others_share(before, _busy_seconds()))


def _busy_seconds() -> tuple[float, float, float]:
    """Of all cores since the machine started: seconds at work, seconds in all; and this process's own."""
    found = psutil.cpu_times()
    idle = found.idle + getattr(found, "iowait", 0.0)
    return sum(found[:8]) - idle, sum(found[:8]), time.process_time()  # guests count twice behind the eighth


def _others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    busy, whole, own = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy - own) / whole if whole > 0 else 0.0


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of square matrices, the best of a fraction of a second."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best_seconds(lambda: (left @ left)[0, 0].item())


def _search_seconds(device: torch.device) -> float:
    weight_OI = torch.randn(512 if device.type == "cpu" else 8192, 2048, device=device)
    importance_I, grid = torch.rand(2048, device=device), Grid.of(Scheme(bits=4, group_size=128))
    if device.type == "cpu" and native.library() is not None:
        turned_IO, out_GO = weight_OI.T.contiguous(), torch.empty(16, 512)
        given = (turned_IO, importance_I, grid, DEFAULT_SEARCH, 128, torch.bfloat16, out_GO)
        return _best_seconds(lambda: native.search_scales(*given)) / weight_OI.numel() / torch.get_num_threads()
    asked = (weight_OI[None], importance_I[None], grid, 128, torch.bfloat16)
    return _best_seconds(lambda: search_scales_on(*asked)[0, 0, 0].item()) / weight_OI.numel()


def _load_seconds(*, fp8: bool) -> float:
    stored = torch.randn(1024, 2048).to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    scales = torch.ones(8, 16)

    def load() -> bool:
        dense = dequantize_blocks(stored, scales, (128, 128)) if fp8 else stored.float()
        return bool(torch.isfinite(dense).all())

    return _best_seconds(load) / stored.numel()


def _best_seconds(work: Callable[[], object], limit_seconds: float = 0.15) -> float:
    work()  # what is set up once is not counted
    samples, start = list[float](), time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - start < limit_seconds:
        begin = time.perf_counter()
        work()
        samples.append(time.perf_counter() - begin)
    return min(samples)  # what other processes take away is not this machine's speed


def read_rate(files: Iterable[Path]) -> float | None:
    """Bytes per second of reading these files from the disk; None where that cannot be told.

    Asks the system to forget the part of its cache that holds them. Files with holes and little files tell nothing.
    """
    forget = getattr(os, "posix_fadvise", None)
    if forget is None:
        return None
    buffer, got, seconds = memoryview(bytearray(_CHUNK_BYTES)), 0, 0.0
    for file in sorted(files):
        found = file.stat()
        if found.st_blocks * 512 < found.st_size:
            continue
        with file.open("rb", buffering=0) as stream:
            forget(stream.fileno(), 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while got < _SAMPLE_BYTES and seconds + time.perf_counter() - start < _SAMPLE_SECONDS:
                count = stream.readinto(buffer)
                if not count:
                    break
                got += count
            seconds += time.perf_counter() - start
        if got >= _SAMPLE_BYTES or seconds >= _SAMPLE_SECONDS:
            break
    return got / seconds if got >= _LEAST_SAMPLE_BYTES else None
