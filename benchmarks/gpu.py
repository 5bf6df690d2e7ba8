"""Everything that wants a CUDA device, in one call of less than ten minutes: kernels' tests, solver, R1's width, ONNX.

    python benchmarks/gpu.py                         # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --small    # proves the script, and says nothing about a GPU
    python benchmarks/gpu.py --steps solver r1       # some of the steps

Steps, each a process of its own with its own time limit, so that one that hangs or fails takes none of the others away:

kernels  the fused kernels' tests, compiled for the device and not interpreted
tests    all tests that are marked `gpu`
solver   gptq_cuda.py: a layer of Qwen3-30B-A3B, experts as one batch against one by one
r1       r1_layer.py: one dense and one MoE layer of DeepSeek-R1's width, 131,072 tokens, all 256 experts; 12.2 GB for
         the checkpoint and 7 GB for the output in --work, which are deleted again
onnx     onnx_cuda.py: QMoE, attention and whole exports in onnxruntime-gpu

The file is written again after every step: what the device is, the versions, and of each step its outcome, its time,
the end of what it said, and its own figures. Ends with 0 where no step failed, with 1 where one did, and with 2 where
torch finds no CUDA device. A step whose package is missing is `not available`, which is no failure. It needs torch, and
what the steps need; moepress itself has not to be installed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "onnxruntime-gpu", "onnxruntime")
TAIL = 4000  # characters of what a step said
NOT_AVAILABLE, NO_TESTS = 5, 5  # onnx_cuda.py where no session gets CUDA; pytest where no test is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A process.

    Attributes:
        name: for --steps.
        command: without the interpreter.
        limit_seconds: then it is killed.
        figures: the file that it writes.
        mild: exit statuses that are no failure, and what they mean.
    """

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    figures: Path | None = None
    mild: tuple[tuple[int, str], ...] = ()


def steps(work: Path, *, cuda: bool, small: bool, card_bytes: int = 24 << 30) -> list[Step]:
    """All steps; the limits of those on a GPU come to 570 seconds.

    Args:
        work: a folder for what is made.
        cuda: on the GPU.
        small: small shapes.
        card_bytes: memory of the GPU, of which half is given to the layer of R1's width, as moepress would by itself.
    """
    results = RESULTS if cuda and not small else work
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    solver, r1, onnx = (str(SCRIPTS / name) for name in ("gptq_cuda.py", "r1_layer.py", "onnx_cuda.py"))
    device = ("--device", "cuda" if cuda else "cpu")
    few = ("--small",) if small else ()
    layer = ("--stages", "quantize", "--max-pieces", "0", "--quantize-experts", "32" if small else "256")
    layer += () if small else ("--tokens", "131072", "--max-memory", f"{card_bytes >> 31}GiB")
    no_tests = ((NO_TESTS, "no tests"),)
    files = {name: results / f"{name}.json" for name in ("gptq_cuda", "r1_layer_cuda")}
    return [
        Step(
            name="kernels",
            command=(*pytest, "-m", "slow or not slow", "tests/compress/gptq/test_fused.py"),
            limit_seconds=80,
        ),
        Step(name="tests", command=(*pytest, "-m", "gpu", "tests"), limit_seconds=100, mild=no_tests),
        Step(
            name="solver",
            command=(solver, *device, *few, "--repeat", "1", "--json", str(files["gptq_cuda"])),
            limit_seconds=110,
            figures=files["gptq_cuda"],
        ),
        Step(
            name="r1",
            command=(r1, "--work", str(work / "r1"), *device, *few, *layer, "--json", str(files["r1_layer_cuda"])),
            limit_seconds=200,
            figures=files["r1_layer_cuda"],
        ),
        Step(
            name="onnx",
            command=(onnx, "--provider", device[1], *few, *(("--parts", "qmoe,attention") if small else ())),
            limit_seconds=80,
            figures=RESULTS / "onnx_cuda.json" if cuda else None,
            mild=((NOT_AVAILABLE, "not available"),),
        ),
    ]


def environment(work: Path) -> dict[str, str]:
    """What steps run in: with this checkout's moepress, whether it is installed, or another one is."""
    folder = work / "path"
    folder.mkdir()
    (folder / "moepress").symlink_to(ROOT)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return dict(os.environ) | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def run(step: Step, around: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Run a step until it ends or its time is over; then it goes with all that it started."""
    if step.figures is not None:
        step.figures.unlink(missing_ok=True)  # of an earlier run
    start = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=around,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(step.limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    text = log.read_text(errors="replace")
    figures = None
    if step.figures is not None and step.figures.is_file():
        figures = json.loads(step.figures.read_text())
    return {
        "step": step.name,
        "command": list(step.command),
        "outcome": outcome(step, status, text),
        "exit_status": status,
        "seconds": time.perf_counter() - start,
        "limit_seconds": step.limit_seconds,
        "said": text[-TAIL:],
        "figures": figures,
    }


def outcome(step: Step, status: int | None, said: str) -> str:
    """In a word or two."""
    if status is None:
        return "timed out"
    if status == 0:
        return "passed"
    if "No module named pytest" in said:
        return "not available"
    return dict(step.mild).get(status, "failed")


def facts(device: torch.device) -> dict[str, Any]:
    """What the device is, and the versions."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "memory_bytes": card.total_memory, "driver": driver()}
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    return found | {"python": platform.python_version(), "versions": {name: installed(name) for name in PACKAGES}}


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split("\n")[0].strip() or None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in steps(Path(), cuda=True, small=False)]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, a tiny R1")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="some of them (default: all)")
    parser.add_argument("--work", type=Path, help="folder for a temporary one of 20 GB (default: the system's)")
    parser.add_argument("--json", type=Path, help="file (default: benchmarks/results/gpu.json on a GPU)")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.small:
        parser.error("--device cpu goes with --small")
    return given


def main() -> int:
    given = parsed()
    cuda = given.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("torch finds no CUDA device here; --device cpu --small tries the script.", file=sys.stderr)
        return 2
    file = given.json or (RESULTS / "gpu.json" if cuda and not given.small else None)
    about = facts(torch.device(given.device)) | {"small": given.small}
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moepress-gpu-", dir=given.work) as name:
        work = Path(name)
        around = environment(work)
        for step in steps(work, cuda=cuda, small=given.small, card_bytes=about.get("memory_bytes", 24 << 30)):
            if step.name not in given.steps:
                continue
            row = run(step, around, work / f"{step.name}.log")
            rows.append(row)
            print(f"\n{step.name}: {row['outcome']} in {row['seconds']:.0f} s of {step.limit_seconds:.0f}", flush=True)
            print("\n".join(row["said"].splitlines()[-12:]), flush=True)
            if file:
                file.write_text(json.dumps(about | {"steps": rows}, indent=2) + "\n")
    print("\n" + ", ".join(f"{row['step']} {row['outcome']}" for row in rows))
    return int(any(row["outcome"] in ("failed", "timed out") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
