"""`doctor`: what this machine and this environment are, and what is wrong with them.

Facts are gathered (`diagnose`), then judged by pure functions over plain data (`clashes_of`, `hints_of`, `notes_of`),
so the judgement can be tried on machines that are not at hand. Versions come from the packages' metadata; imported are
torch, onnx and ONNX Runtime alone, and each may fail.
"""

import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepress import __version__
from moepress.converters.onnx.runtime import (
    CPU_PROVIDER,
    INSTALL,
    OPTIONAL_PROVIDERS,
    TESTED_ONNXRUNTIME,
    WHEELS,
    Runtime,
    Session,
    installed_version,
    reinstall,
    runtime_state,
)

GIB = 1 << 30
LITTLE_DISK_BYTES = 10 * GIB
PACKAGES = (
    *("torch", "transformers", "safetensors", "compressed-tensors"),
    *("onnx", *WHEELS, "onnxruntime-genai", "onnxruntime-genai-cuda"),
    *("vllm", "gptqmodel", "auto-gptq"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The computer; `cores` are logical ones."""

    moepress: str
    python: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int
    free_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A place where moepress writes or reads much; `free_bytes` is None where the system does not tell."""

    use: str
    folder: str
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU that torch can compute on."""

    name: str
    memory_bytes: int
    free_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What torch computes on.

    Attributes:
        cuda_build: the CUDA version that torch was built for; None for other builds.
        error: what torch said while it was imported or looked for devices.
        loops: the build of the solver's native inner loops that this processor gets; None where there is none.
        no_loops: why there is none.
    """

    cuda_build: str | None = None
    devices: tuple[Device, ...] = ()
    mps: bool = False
    imported: bool = True
    error: str | None = None
    loops: str | None = None
    no_loops: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is judged. `packages` maps a name to the installed version, or None."""

    machine: Machine
    disks: tuple[Disk, ...]
    packages: dict[str, str | None]
    torch: Torch
    runtime: Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The facts, and what follows.

    Attributes:
        clashes: what makes ONNX Runtime unusable or arbitrary; with one of these the command ends with 5.
        problems: one sentence each with the mend, the clashes first.
        notes: what one may want to know and need not mend.
    """

    facts: Facts
    clashes: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def diagnose(folder: Path) -> Diagnosis:
    """Look at this machine; nothing is changed.

    Args:
        folder: where outputs will lie; for the free space only, it need not exist.
    """
    return judge(
        Facts(
            machine=_machine(),
            disks=(_disk("folder", folder), _disk("Hugging Face cache", _cache_folder())),
            packages={name: installed_version(name) for name in PACKAGES},
            torch=_torch(),
            runtime=runtime_state(),
        )
    )


def judge(facts: Facts) -> Diagnosis:
    """What the facts mean."""
    clashes = clashes_of(facts)
    return Diagnosis(facts=facts, clashes=clashes, problems=(*clashes, *hints_of(facts)), notes=notes_of(facts))


def clashes_of(facts: Facts) -> tuple[str, ...]:
    """What makes ONNX Runtime unusable, or a matter of chance."""
    if facts.runtime.error:
        return (facts.runtime.error,)
    wheels = [name for name in WHEELS if facts.packages[name]]
    if len(wheels) < 2:
        return ()
    both = " and ".join(f"{name} {facts.packages[name]}" for name in wheels)
    genai = facts.packages["onnxruntime-genai"] and wheels != ["onnxruntime"]
    because = " (onnxruntime-genai requires the CPU wheel; the one for CUDA is onnxruntime-genai-cuda)" if genai else ""
    return (
        f"{both} are both installed and share one folder, so either may be overwritten{because}; {reinstall(*wheels)}.",
    )


def hints_of(facts: Facts) -> tuple[str, ...]:
    """What is worth mending, and ends no command."""
    return (*_runtime_hints(facts), *_torch_hints(facts.torch), *_disk_hints(facts.disks), *_package_hints(facts))


def notes_of(facts: Facts) -> tuple[str, ...]:
    """What is as it may be."""
    return (*_loops_notes(facts.torch), *_runtime_notes(facts))


def _loops_notes(torch: Torch) -> Iterator[str]:
    if torch.no_loops:
        yield (
            f"The solver has no native loops ({torch.no_loops}), and quantizes three times slower; with a C++ "
            "compiler at hand, `pip install --force-reinstall --no-deps moepress` builds them."
        )


def _runtime_notes(facts: Facts) -> Iterator[str]:
    if facts.runtime.version is None and facts.runtime.error is None:
        yield f"ONNX Runtime is not installed, which only ONNX models need; {INSTALL}."


def _runtime_hints(facts: Facts) -> Iterator[str]:
    runtime = facts.runtime
    if runtime.version is None:
        return
    if runtime.onnx_error:
        yield runtime.onnx_error
    low, high = TESTED_ONNXRUNTIME
    found = re.match(r"(\d+)\.(\d+)", runtime.version)
    if found is None or not low <= (int(found[1]), int(found[2])) < high:
        wheel = next((name for name in WHEELS if facts.packages[name]), WHEELS[0])
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        yield (
            f"onnxruntime {runtime.version} is not among the versions that moepress is tested with ({wanted}); "
            f'`pip install "{wheel}{wanted}"` gets one.'
        )
    for session in runtime.sessions:
        if session.asked not in session.got and session.asked not in OPTIONAL_PROVIDERS:
            yield _missed(session)


def _missed(session: Session) -> str:
    """A provider that was claimed and not obtained."""
    reason = f" ({reason_of(session.said)})" if session.said else ""
    if session.asked == CPU_PROVIDER:
        return f"ONNX Runtime makes no session on the CPU{reason}; {reinstall()}."
    got = ", ".join(session.got) or "nothing"
    mend = "install the driver and libraries it needs"
    if session.asked == "CUDAExecutionProvider":
        mend = (
            "check the driver with `nvidia-smi`, and get the CUDA libraries with "
            '`pip install "onnxruntime-gpu[cuda,cudnn]"`'
        )
    return (
        f"ONNX Runtime lists {session.asked}, but a session that asked for it got {got}{reason}, for it falls "
        f"back without an error; {mend}, or use the CPU."
    )


def reason_of(said: str) -> str:
    """The cause in ONNX Runtime's log: the library that is missing, or else the last of its first line."""
    found = re.search(r"with error: (.+)", said)
    line = found[1] if found else said.strip().splitlines()[0]
    return re.sub(r"\x1b\[[\d;]*m", "", line).strip().rstrip(".")


def _torch_hints(torch: Torch) -> Iterator[str]:
    reason = f" ({torch.error})" if torch.error else ""
    if not torch.imported:
        yield f"torch does not import{reason}; reinstall it."
    elif torch.cuda_build and not torch.devices:
        yield (
            f"torch is built for CUDA {torch.cuda_build} and finds no usable device{reason}; check the driver with "
            "`nvidia-smi`, or go on with `--device cpu`."
        )


def _disk_hints(disks: Sequence[Disk]) -> Iterator[str]:
    little = [d for d in disks if d.free_bytes is not None and d.free_bytes < LITTLE_DISK_BYTES]
    if little:
        places = " and ".join(f"{disk.folder} ({gib_text(disk.free_bytes)})" for disk in little)
        yield (
            f"Less than {gib_text(LITTLE_DISK_BYTES)} are free at {places}; make room, or use another disk (`-o` for "
            "outputs, the variable HF_HOME for the Hugging Face cache)."
        )


def _package_hints(facts: Facts) -> Iterator[str]:
    if version := facts.packages["auto-gptq"]:
        yield (
            f"auto-gptq {version} is archived and does not import beside transformers 5; take it away with "
            "`pip uninstall auto-gptq` (gptqmodel reads the same folders)."
        )


def _machine() -> Machine:
    import psutil

    memory = psutil.virtual_memory()
    return Machine(
        moepress=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        memory_bytes=int(memory.total),
        free_memory_bytes=int(memory.available),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _disk(use: str, folder: Path) -> Disk:
    """The space where the folder is, or would be made."""
    folder = folder.absolute()
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return Disk(use=use, folder=str(folder), free_bytes=None)
    return Disk(use=use, folder=str(folder), free_bytes=free)


def _torch() -> Torch:
    try:
        import torch
    except Exception as error:  # a missing library is an OSError, files of two versions fail in any way
        return Torch(imported=False, error=str(error))
    from moepress.compress.gptq import native

    built = native.library() is not None
    devices: list[Device] = []
    said: str | None = None
    with warnings.catch_warnings(record=True) as caught:  # "The NVIDIA driver on your system is too old ..."
        warnings.simplefilter("always")
        try:
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                free, total = torch.cuda.mem_get_info(index)
                name = torch.cuda.get_device_name(index)
                devices.append(Device(name=name, memory_bytes=total, free_memory_bytes=free))
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
    if said is None and caught:
        said = str(caught[0].message).partition("\n")[0]
    return Torch(
        cuda_build=torch.version.cuda,
        devices=tuple(devices),
        mps=torch.backends.mps.is_available(),
        error=said,
        loops=native.status() if built else None,
        no_loops=None if built else native.status(),
    )


def gib_text(size: int | None) -> str:
    """A size for people; None is unknown."""
    return "unknown" if size is None else f"{size / GIB:,.1f} GiB"
