"""Memory of `export --to onnx` on an artifact that is much larger, and proof that its result opens.

    python benchmarks/onnx_memory.py [--gigabytes 8] [--vocabulary 151936] [--work DIR] [--keep]

Makes a compressed-tensors folder of that size (random 4-bit codes in groups of 32, experts of Qwen3-30B-A3B's shape),
exports it with `--no-check` in a process of its own, and reads that process's memory from /proc every 20 ms. RssAnon
is what the process needs for itself; VmHWM is the peak of all that is resident. Then the result is opened and decodes
one token, in a process of its own each time: `mapped`, with ONNX Runtime's prepacking switched off, which leaves the
weights in their mapped files, and `packed`, as it opens a model by default, which copies them for speed. Needs two and
a half times that size on the disk, and for `packed` as much memory as the export has. Only a run of at least 8 GB is
written to benchmarks/results.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from processes import memory_mib, watched

GOAL_MIB = 1536.0  # of RssAnon
GOAL_GIGABYTES = 8.0
DISK_FACTOR = 2.5  # scales become fp32, and so does lm_head
INTERVAL_SECONDS = 0.02
TOKEN = 5


def open_and_step(folder: Path, way: str) -> None:
    """Open an export in this process, decode one token, and print what that took as JSON."""
    import torch

    from moepress.converters.onnx.folder import MODEL, open_onnx
    from moepress.converters.onnx.runtime import CPU_PROVIDER, require_onnxruntime, session_options
    from moepress.validation.quality.onnx_session import Decoding, OnnxModel

    runtime, options = require_onnxruntime(), session_options()
    options.intra_op_num_threads = torch.get_num_threads()
    if way == "mapped":
        options.add_session_config_entry("session.disable_prepacking", "1")
    imported, start = memory_mib(), time.perf_counter()
    opened_folder = open_onnx(folder)
    session = runtime.InferenceSession(str(folder / MODEL), options, providers=[CPU_PROVIDER])
    model = OnnxModel(folder=opened_folder, session=session, providers=tuple(session.get_providers()))
    opened, seconds = memory_mib(), time.perf_counter() - start
    logits = Decoding(model).step(torch.tensor([[TOKEN]]))  # which refuses NaN and Inf
    assert tuple(logits.shape) == (1, 1, model.folder.vocabulary)
    stepped = time.perf_counter() - start - seconds
    memory = {"imported_mib": imported, "opened_mib": opened, "stepped_mib": memory_mib()}
    print(json.dumps({"open_seconds": seconds, "step_seconds": stepped, "providers": model.providers, **memory}))


def opened(folder: Path) -> dict[str, Any]:
    """What each way of opening takes; `packed` is left out where the memory is too small."""
    found = {}
    for way in ("mapped", "packed"):
        size, free = sum(file.stat().st_size for file in folder.iterdir()), psutil.virtual_memory().available
        if way == "packed" and free < 1.2 * size:
            print(f"packed: not tried, {free / 1e9:.0f} GB of memory are free for {size / 1e9:.0f} GB")
            continue
        watch = watched([sys.executable, __file__, "--open", str(folder), "--way", way], INTERVAL_SECONDS)
        said = json.loads(watch["stdout"].splitlines()[-1])
        found[way] = said | {"peak_mib": watch["peak_mib"]}
        after = said["stepped_mib"]
        print(
            f"{way}: opened in {said['open_seconds']:.1f} s, one token in {said['step_seconds']:.2f} s on "
            f"{said['providers'][0]}; anonymous {after['RssAnon']:.0f} MiB, mapped {after['RssFile']:.0f} MiB, peak "
            f"RssAnon {watch['peak_mib']['RssAnon']:.0f} MiB (libraries alone {said['imported_mib']['VmRSS']:.0f} MiB)",
            flush=True,
        )
    return found


def measure(work: Path, gigabytes: float, vocabulary: int) -> dict[str, Any]:
    """Make, export and open; the figures of all three."""
    artifact, exported = work / "artifact", work / "exported"
    code = (
        "from made import *; print(*make_packed_qwen3_moe("
        f"Path({str(artifact)!r}), Scheme(bits=4, group_size=32), total_bytes={int(gigabytes * 1e9)}, "
        f"vocabulary={vocabulary}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the artifact could not be made: {done.stderr.strip().splitlines()[-1]}")
    layers, size = map(int, done.stdout.split())
    print(f"made an artifact of {size / 1e9:.2f} GB with {layers} layers", flush=True)
    export = ["export", str(artifact), "--to", "onnx", "--no-check", "-o", str(exported)]
    found = watched([sys.executable, "-m", "moepress", *export], INTERVAL_SECONDS)
    written = sum(file.stat().st_size for file in exported.iterdir())
    row = {
        "artifact_bytes": size,
        "layers": layers,
        "exported_bytes": written,
        "export_seconds": found["seconds"],
        "export_peak_mib": found["peak_mib"],
        "export_samples": found["samples"],
        "read_mb_per_second": size / 1e6 / found["seconds"],
    }
    peaks = found["peak_mib"]
    print(
        f"export: peak RssAnon {peaks['RssAnon']:.0f} MiB, VmHWM {peaks['VmHWM']:.0f} MiB, {found['samples']} samples; "
        f"{found['seconds']:.1f} s, {row['read_mb_per_second']:.0f} MB/s read, {written / 1e9:.2f} GB written",
        flush=True,
    )
    return row | {"opening": opened(exported)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=GOAL_GIGABYTES, help="least size of the artifact")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--work", type=Path, help="where the big files go; the system's temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="leave the big files")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_and_step(arguments.open, arguments.way)
        return
    from setting import save

    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="onnx-memory-", dir=arguments.work))
    needed, free = DISK_FACTOR * arguments.gigabytes * 1e9, shutil.disk_usage(work).free
    try:
        if free < needed:
            raise SystemExit(f"{work} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; give --work.")
        row = measure(work, arguments.gigabytes, arguments.vocabulary)
    finally:
        if arguments.keep:
            print(f"kept in {work}")
        else:
            shutil.rmtree(work)
    met = row["export_peak_mib"]["RssAnon"] < GOAL_MIB
    print(f"goal of less than {GOAL_MIB:.0f} MiB anonymous memory: {'met' if met else 'missed'}")
    if arguments.gigabytes >= GOAL_GIGABYTES:
        save("onnx_memory", [row], goal_mib=GOAL_MIB)


if __name__ == "__main__":
    main()
